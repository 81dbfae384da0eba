"""llama.cpp has a Jinja of its own: from each named template it makes the prompt that the tokenizer makes."""

import re
from pathlib import Path

import pytest

from jaxtune import get_chat_template
from jaxtune.data.templates import TEMPLATES
from tests.data.named_formats import FORMATS, WITHOUT_SYSTEM
from tests.export.adapted import Adapted
from tests.export.llama_cpp import LlamaCpp

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


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda template: template.name)
def test_llama_cpp_makes_the_same_prompts(model_file, template):
    form = FORMATS[template.name]._replace(bos=BOS, eos=EOS, adds_bos=False)
    tokenizer = get_chat_template(form.tokenizer(), template.name, map_eos_token=False)
    chats = [CHAT[:1], CHAT, *([] if template.name in WITHOUT_SYSTEM else [SYSTEM + CHAT])]
    expected = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    llama_cpp = LlamaCpp(model_file, template=tokenizer.chat_template)
    found = [llama_cpp.prompt(chat) for chat in chats]
    assert [DATE.sub(r"\1", text) for text in found] == [DATE.sub(r"\1", text) for text in expected]
