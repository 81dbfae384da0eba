"""What lies beside the weights: an export has the original's files, or those of the tokenizer that it was given, and
transformers' tokenizer of it cuts and renders as the base's does. The settings are published ones; the vocabularies,
which are too large to keep, stand-ins with their special tokens in place."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from jaxtune import get_chat_template
from jaxtune.export.compressed_folder import save_compressed
from jaxtune.export.hf_folder import PROCESSOR_FILES, TOKENIZER_FILES
from jaxtune.export.merged_4bit import save_merged_4bit
from jaxtune.export.merged_folder import save_merged_16bit
from jaxtune.loading.tokenizer import load_tokenizer
from tests.export.adapted import Adapted
from tests.export.byte_level import NASTY, byte_level
from tests.export.sentence_piece import sentence_piece
from tests.kit import published

CHAT = [
    {"role": role, "content": text}
    for role, text in (("user", "Hi?"), ("assistant", "Yes."), ("user", "So?"))
]
METHODS = {
    "merged_16bit": save_merged_16bit,
    "merged_4bit": save_merged_4bit,
    "fp8_dynamic": functools.partial(save_compressed, scheme="fp8_dynamic"),
}
SIDE_FILES = (*TOKENIZER_FILES, *PROCESSOR_FILES, "generation_config.json")
BESIDE = (*SIDE_FILES, "config.json")
MODELS = (
    "llama-2-7b-fp16", "mistral-7b-v0.1-finetune-32002", "phi-3-mini-4k-instruct", "qwen2.5-7b-instruct",
    "tinyllama-1.1b-chat-v1.0",
)  # fmt: skip
WRITTEN_DOWN = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "legacy": True,
    "chat_template": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
}
"""For a clone without published files."""


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    rope = {"rope_type": "default", "rope_theta": 1e4}  # which every family has
    folder = tmp_path_factory.mktemp("side")
    return Adapted(folder, dtype="bfloat16", rope_parameters=rope)


def vocabulary(settings):
    """A tokenizer.json in which these settings' added tokens have their own ids."""
    pieces = "sp_model_kwargs" in settings or settings["tokenizer_class"] == "LlamaTokenizer"
    trained = sentence_piece("llama 2") if pieces else byte_level("qwen2")
    spec = json.loads(trained.backend_tokenizer.to_str())
    spec["post_processor"] = None
    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = added or {
        i: {**flags, "content": token, "special": True} for i, token in enumerate(("<unk>", "<s>", "</s>"))
    }
    taken = {token["content"] for token in [*added.values(), *spec["added_tokens"]]}
    learnt = iter([token for token in spec["model"]["vocab"] if token not in taken])
    size = max(*added, len(spec["model"]["vocab"])) + 1
    ids = {added[i]["content"] if i in added else next(learnt, f"unused {i}"): i for i in range(size)}
    spec["model"]["vocab"] = ids
    spec["model"]["merges"] = [
        pair for pair in spec["model"]["merges"] if {*pair, "".join(pair)} <= ids.keys()
    ]
    spec["added_tokens"] = [{"id": i, **added[i]} for i in sorted(added)]
    return json.dumps(spec)


def publishings():
    """What lies beside the weights, by the model."""
    found = {
        folder.name: {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
        for folder in published.folders("tokenizer_config.json")
        if folder.name in MODELS
    }
    return {"written down": {"tokenizer_config.json": json.dumps(WRITTEN_DOWN).encode()}, **found}


def beside(adapted, folder, files):
    """The adapted model's base with these files."""
    base = Path(shutil.copytree(adapted.base, folder))
    config = json.loads((base / "config.json").read_text())
    if "config.json" in files:  # which has a say in the tokenizer's class
        config["model_type"] = json.loads(files["config.json"])["model_type"]
    for name in SIDE_FILES:
        (base / name).unlink(missing_ok=True)
    for name, content in files.items():
        (base / name).write_bytes(content)
    (base / "config.json").write_text(json.dumps(config))
    if "tokenizer.json" not in files:
        (base / "tokenizer.json").write_text(vocabulary(json.loads(files["tokenizer_config.json"])))
    return adapted._trained._replace(base=base)


def side_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in SIDE_FILES}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_carries_all_of_them(adapted, tmp_path, method):
    trained = beside(adapted, tmp_path / "base", side_files(adapted.base))
    for name in SIDE_FILES:
        if not (trained.base / name).exists():
            (trained.base / name).write_text(json.dumps({"of": name}))
    METHODS[method](tmp_path / "out", trained)
    assert set(side_files(trained.base)) == set(SIDE_FILES)
    assert side_files(tmp_path / "out") == side_files(trained.base)


def test_the_originals_tokenizer_is_its_files(adapted, tmp_path):
    """Whatever was padded with it: those that were published, to the byte."""
    for name, files in publishings().items():
        trained = beside(adapted, tmp_path / name, files)
        tokenizer = load_tokenizer(trained.base)
        tokenizer(["a", "a longer one"], padding=True, truncation=True, max_length=2)
        for given in (None, tokenizer):
            save_merged_16bit(
                tmp_path / "out", trained, tokenizer=given, verify=False
            )  # it has a Llama's weights
            out = side_files(tmp_path / "out")
            # Where generation stops is said there too.
            end = json.loads(out.pop("generation_config.json", b"{}")).get("eos_token_id")
            assert (
                end is None
                or tokenizer.eos_token_id in ([end] if isinstance(end, int) else end)
                or given is None
            )
            expected = side_files(trained.base)
            expected.pop("generation_config.json", None)
            assert out == expected, name


def test_another_tokenizer_is_saved_as_it_is(adapted, tmp_path):
    """By transformers, which writes other files: the texts are cut and rendered as before."""
    for name, files in publishings().items():
        trained = beside(
            adapted, tmp_path / name, {**files, "tokenizer.model": b"pieces", "merges.txt": b"old"}
        )
        tokenizer = load_tokenizer(trained.base)
        tokenizer.add_tokens(["<|mine|>"])
        save_merged_16bit(tmp_path / "out", trained, tokenizer=tokenizer, verify=False)
        again, original = (
            AutoTokenizer.from_pretrained(tmp_path / "out"),
            AutoTokenizer.from_pretrained(trained.base),
        )
        texts = [text for text in NASTY if "<|mine|>" not in text]
        assert again(texts)["input_ids"] == tokenizer(texts)["input_ids"] == original(texts)["input_ids"], (
            name
        )
        assert again.special_tokens_map == tokenizer.special_tokens_map, name
        assert again.convert_tokens_to_ids("<|mine|>") == len(original), name
        assert again.chat_template == original.chat_template, name
        if original.chat_template:
            assert again.apply_chat_template(CHAT, tokenize=False) == original.apply_chat_template(
                CHAT, tokenize=False
            )
        assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
        assert not (tmp_path / "out" / "merges.txt").exists(), "it may be another tokenizer's"


def test_a_new_chat_template_is_a_new_tokenizer(adapted, tmp_path):
    trained = beside(adapted, tmp_path / "base", publishings()["written down"])
    tokenizer = get_chat_template(load_tokenizer(trained.base), "chatml", map_eos_token=False)
    save_merged_16bit(tmp_path / "out", trained, tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )
    assert again.apply_chat_template(CHAT, tokenize=False).startswith("<|im_start|>")
