"""llama.cpp has a Jinja of its own: from each named template it makes the prompt that the tokenizer makes."""

import json
import re
import urllib.request
from pathlib import Path

import pytest
import xllamacpp

from jaxtune import get_chat_template
from jaxtune.data.templates import TEMPLATES
from tests.data.named_formats import FORMATS, WITHOUT_SYSTEM
from tests.export.adapted import Adapted

BOS, EOS = "<|begin|>", "<|end|>"
CHAT = [
    {"role": "user", "content": " Hi?\n"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": 'And <b>&"it\'s" naïve 🙂?'},
]
SYSTEM = [{"role": "system", "content": "Be brief."}]
DATE = re.compile(r"(Today Date: ).*")  # llama.cpp gives templates that ask for it the date of the day


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return Adapted(folder, adapter=False).save_gguf(folder / "out", ["f16"])[0]


def prompts_of_llama_cpp(file: Path, jinja: str, chats: list[list[dict]]) -> list[str]:
    params = xllamacpp.CommonParams()
    params.model.path, params.chat_template, params.use_jinja = str(file), jinja, True
    params.n_ctx, params.warmup, params.verbosity = 64, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    prompts = []
    for chat in chats:
        request = urllib.request.Request(
            f"{server.listening_address}/apply-template",
            data=json.dumps({"messages": chat}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as reply:
            prompts.append(json.load(reply)["prompt"])
    return prompts


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_llama_cpp_makes_the_same_prompts(model_file, template):
    form = FORMATS[template.name]._replace(bos=BOS, eos=EOS, adds_bos=False)
    tokenizer = get_chat_template(form.tokenizer(), template.name, map_eos_token=False)
    chats = [CHAT[:1], CHAT, *([] if template.name in WITHOUT_SYSTEM else [SYSTEM + CHAT])]
    expected = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    found = prompts_of_llama_cpp(model_file, tokenizer.chat_template, chats)
    assert [DATE.sub(r"\1", text) for text in found] == [DATE.sub(r"\1", text) for text in expected]
