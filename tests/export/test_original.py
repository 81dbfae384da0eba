"""A model that was loaded from a quantised copy is merged into the original, which is found and recognised; the
quantised weights themselves are merged into on request only."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.errors import AdapterError, CheckpointError, ModelNotFoundError, OptionError
from jaxtune.export.compressed_folder import save_compressed
from jaxtune.export.merge import Trained
from jaxtune.export.original import RECORD, require_same
from jaxtune.loading.checkpoint import Checkpoint
from tests.export.adapted import IDS, logits_of_folder
from tests.kit import models
from tests.kit.compare import assert_close, relative_rms
from tests.kit.hub import FakeHub

SQUARE = {"intermediate_size": 128, "num_key_value_heads": 8}
"""All linears of one shape: little to compile."""


def base_folder(folder, dtype="bfloat16", **settings):
    return models.save(models.random_llama(**SQUARE | settings).to(getattr(torch, dtype)), folder)


def edit_config(folder, edit):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    edit(settings)
    path.write_text(json.dumps(settings))


def forget(copy):
    """As if somebody else had written it."""
    edit_config(copy, lambda settings: settings["quantization_config"].pop(RECORD))


def quantised(base, folder, **options):
    model, tokenizer = FastLanguageModel.from_pretrained(base, dtype="bfloat16", **options)
    model.save_pretrained(folder, tokenizer)
    return folder


def adapted(folder, **options):
    """With an adapter that is awake, the same for each folder."""
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", **options)
    model = FastLanguageModel.get_peft_model(model, r=4)
    rng = np.random.default_rng(0)
    noise = lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32)
    return dataclasses.replace(model, lora=jax.tree.map(noise, model.lora))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `tiny`, and `tiny-bnb-4bit` that was made from it and does not say so."""
    folder = tmp_path_factory.mktemp("original")
    base = base_folder(folder / "tiny")
    forget(quantised(base, folder / "tiny-bnb-4bit"))
    adapted(base).save_pretrained_merged(folder / "merged")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return Path(shutil.copytree(made / "tiny-bnb-4bit", tmp_path / "copy"))


def weights(folder):
    return {name: array.tobytes() for name, array in load_file(folder / "model.safetensors").items()}


def card(head):
    return f"---\n{head}\nlicense: mit\n---\n# Tiny\n"


def recorded(copy, base):
    edit_config(
        copy,
        lambda settings: settings["quantization_config"].update(
            {RECORD: {"name_or_path": str(base), "revision": None}}
        ),
    )


SAID = {
    "by what we wrote": recorded,
    "by transformers 4": lambda copy, base: edit_config(
        copy, lambda c: c.update({"_name_or_path": str(base)})
    ),
    "by its card": lambda copy, base: (copy / "README.md").write_text(card(f"base_model: {base}")),
    "by a list in its card": lambda copy, base: (copy / "README.md").write_text(
        card(f"base_model:\n- nobody/nothing\n- {base}\nbase_model_relation: quantized")
    ),
    "by its name": lambda copy, base: shutil.copytree(base, copy.with_name("tiny")),
}


@pytest.mark.parametrize("said", SAID)
def test_the_merge_is_of_the_original(made, tmp_path, said, caplog):
    copy = Path(shutil.copytree(made / "tiny-bnb-4bit", tmp_path / "tiny-bnb-4bit"))
    SAID[said](copy, made / "tiny")
    with caplog.at_level(logging.INFO):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")
    assert weights(tmp_path / "merged") == weights(made / "merged")
    assert "is quantised: the merge starts from its original" in caplog.text
    assert (tmp_path / "merged" / "config.json").read_text() == (made / "merged" / "config.json").read_text()


def test_a_named_original(made, copy, tmp_path):
    adapted(copy).save_pretrained_merged(tmp_path / "merged", original_model=made / "tiny")
    assert weights(tmp_path / "merged") == weights(made / "merged")
    (file,) = adapted(copy).save_pretrained_gguf(
        tmp_path / "model", quantization_method="q8_0", original_model=made / "tiny"
    )
    assert file.name == "tiny.Q8_0.gguf"


def test_nothing_says_which(copy, tmp_path):
    with pytest.raises(ModelNotFoundError, match="nor its name says") as caught:
        adapted(copy).save_pretrained_merged(tmp_path / "merged")
    assert "original_model=" in str(caught.value) and "dequantize=True" in str(caught.value)
    assert not (tmp_path / "merged").exists()


def test_what_was_tried_is_said(copy, tmp_path):
    SAID["by its card"](copy, "nobody/nothing")
    SAID["by transformers 4"](copy, tmp_path / "gone")
    with pytest.raises(ModelNotFoundError, match=r"gone.*nobody/nothing"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")


def test_a_card_of_something_trained_further_says_nothing(made, copy, tmp_path):
    (copy / "README.md").write_text(card(f"base_model: {made / 'tiny'}\nbase_model_relation: finetune"))
    with pytest.raises(ModelNotFoundError, match="nor its name says"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")


@pytest.mark.parametrize("broken", ["no card", "---\nbase_model: [\n---\n", "---\n- a list\n---\n"])
def test_a_card_that_cannot_be_read(copy, tmp_path, broken):
    (copy / "README.md").write_text(broken)
    with pytest.raises(ModelNotFoundError, match="nor its name says"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")


def test_a_record_that_cannot_be_read(copy, tmp_path):
    edit_config(copy, lambda settings: settings["quantization_config"].update({RECORD: {"revision": 1}}))
    with pytest.raises(ModelNotFoundError, match="nor its name says"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")


def moved(base, folder, by):
    """The same model, its weights moved by that part of their size."""
    shutil.copytree(base, folder)
    rng = np.random.default_rng(0)
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        noise = rng.normal(0, by * np.std(weight.astype(np.float32)), weight.shape)
        tensors[name] = (weight.astype(np.float32) + noise).astype(weight.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


WRONG = {
    "another model": (
        lambda base, folder: base_folder(folder, seed=1),
        r"of model\.layers\..* of the codes are",
    ),
    "one trained further": (
        lambda base, folder: moved(base, folder, 0.01),
        r"9\d\.\d% of the codes are the same",
    ),
    "a wider one": (
        lambda base, folder: base_folder(folder, vocab_size=400),
        r"model\.embed_tokens\.weight are not in both, or not of one shape",
    ),
    "a deeper one": (
        lambda base, folder: base_folder(folder, num_hidden_layers=3),
        r"model\.layers\.2\..* and 6 more are not in both",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_original_is_refused(made, copy, tmp_path, wrong):
    make, match = WRONG[wrong]
    other = make(made / "tiny", tmp_path / "other")
    with pytest.raises(AdapterError, match=match):
        adapted(copy).save_pretrained_merged(tmp_path / "merged", original_model=other)
    SAID["by its card"](copy, other)
    with pytest.raises(ModelNotFoundError, match=match):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_wrong_copy_of_a_base_that_is_not_quantised(made, tmp_path):
    model = adapted(made / "tiny")
    with pytest.raises(AdapterError, match="of the codes are the same"):
        model.save_pretrained_merged(
            tmp_path / "merged", original_model=moved(made / "tiny", tmp_path / "a", 0.01)
        )
    twin = shutil.copytree(made / "tiny", tmp_path / "twin")
    model.save_pretrained_merged(tmp_path / "merged", original_model=twin)
    assert weights(tmp_path / "merged") == weights(made / "merged")


def test_an_original_that_is_quantised_too(copy, tmp_path):
    other = shutil.copytree(copy, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"original_model=.*holds quantised weights"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged", original_model=other)


def test_a_copy_of_a_copy(made, copy, tmp_path):
    """Even of two that name each other."""
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    SAID["by its card"](copy, other)
    SAID["by a list in its card"](other, copy)
    with pytest.raises(ModelNotFoundError, match="nobody/nothing"):
        adapted(copy).save_pretrained_merged(tmp_path / "merged")
    SAID["by transformers 4"](other, made / "tiny")
    adapted(copy).save_pretrained_merged(tmp_path / "merged")
    assert weights(tmp_path / "merged") == weights(made / "merged")


FORMATS = {
    "nf4 across rows": ({"intermediate_size": 328, "num_hidden_layers": 1}, {}),
    "nf4, plain scales": ({}, {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}),
    "fp4": ({}, {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}}),
    "int8 of float32": ({"dtype": "float32"}, {"load_in_8bit": True}),
}


@pytest.mark.parametrize("format", FORMATS)
def test_copies_of_every_kind_are_recognised(tmp_path, format):
    """Those of float32 too, which int8 rounds before it packs."""
    settings, options = FORMATS[format]
    base = base_folder(tmp_path / "base", **settings)
    copy = quantised(base, tmp_path / "copy", **options)
    require_same(copy, base)
    with pytest.raises(AdapterError, match="of the codes are the same"):
        require_same(copy, moved(base, tmp_path / "moved", 0.01))


def test_a_float8_copy_is_recognised(made, tmp_path):
    model, _ = FastLanguageModel.from_pretrained(made / "tiny", dtype="float32", load_in_16bit=True)
    lm = model.causal_lm
    save_compressed(
        tmp_path / "fp8", Trained(made / "tiny", lm.config, lm.module_names), scheme="fp8_dynamic"
    )
    require_same(tmp_path / "fp8", made / "tiny")
    with pytest.raises(AdapterError, match="of the codes are the same"):
        require_same(tmp_path / "fp8", moved(made / "tiny", tmp_path / "moved", 0.01))


def test_what_we_write_says_what_it_was_made_from(made, tmp_path):
    """Unless it was changed; and transformers does not mind."""

    def said(folder):
        return json.loads((folder / "config.json").read_text())["quantization_config"].get(RECORD)

    base = {"name_or_path": str(made / "tiny"), "revision": None}
    assert said(quantised(made / "tiny", tmp_path / "a")) == base
    model, _ = FastLanguageModel.from_pretrained(made / "tiny", dtype="bfloat16")
    for method in ("merged_4bit", "fp8"):
        model.save_pretrained_merged(tmp_path / method, save_method=method)
        assert said(tmp_path / method) == base
        AutoModelForCausalLM.from_pretrained(tmp_path / method)
    adapted(made / "tiny").save_pretrained_merged(tmp_path / "c", save_method="merged_4bit")
    assert said(tmp_path / "c") is None
    assert said(quantised(tmp_path / "a", tmp_path / "d"))["name_or_path"] == str(tmp_path / "a")
    for copy in ("d", "fp8"):
        adapted(tmp_path / copy).save_pretrained_merged(tmp_path / "merged")
        assert weights(tmp_path / "merged") == weights(made / "merged")


def test_dequantised_on_request(tmp_path, caplog):
    """Then it is the very model that was trained."""
    base = base_folder(tmp_path / "tiny", dtype="float32")
    model, _ = FastLanguageModel.from_pretrained(base, dtype="float32")
    model.save_pretrained(tmp_path / "copy", models.tokenizer())
    model = adapted(tmp_path / "copy")
    with caplog.at_level(logging.INFO):
        model.save_pretrained_merged(tmp_path / "merged", dequantize=True, max_shard_size="300KB")
    assert "quantised weights, not from their original" in caplog.text
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    logits = logits_of_folder(tmp_path / "merged")
    assert_close(logits, jax.jit(model.causal_lm.apply)(model.params, model.lora, IDS), 1e-4)
    model.save_pretrained_merged(tmp_path / "original")
    assert relative_rms(logits, logits_of_folder(tmp_path / "original")) > 1e-2
    assert set(Checkpoint(tmp_path / "merged").names) == set(Checkpoint(base).names)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    (file,) = model.save_pretrained_gguf(tmp_path / "model", quantization_method="f32", dequantize=True)
    assert file.name == "copy.F32.gguf"
    cards = [(tmp_path / folder / "README.md").read_text() for folder in ("merged", "model_gguf", "original")]
    assert ["made of the base's quantised ones" in card for card in cards] == [True, True, False]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dequantize": True}, "dequantize=True, and .*tiny' holds weights that are not quantised"),
        ({"dequantize": True, "original_model": "org/tiny"}, "original_model='org/tiny' and dequantize=True"),
    ],
)
def test_options_that_do_not_fit(made, tmp_path, options, match):
    model = adapted(made / "tiny")
    for save in (model.save_pretrained_merged, model.save_pretrained_gguf):
        with pytest.raises(OptionError, match=match):
            save(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


FIND = """
import functools
from jaxtune.export.original import Base, original_of
from jaxtune.loading.hub import resolve

base = Base(resolve("org/Tiny-bnb-4bit"), "org/Tiny-bnb-4bit")
for token in (None, "secret"):
    print(original_of(base, functools.partial(resolve, token=token)).name)
"""


def test_on_the_hub(made, copy, tmp_path):
    """The card's model is gated; the one by the copy's own name is there for all."""
    (copy / "README.md").write_text(card("base_model: vendor/Tiny"))
    with FakeHub() as hub:
        hub.add("vendor/Tiny", made / "tiny")
        hub.gate("vendor/Tiny", token="secret")
        hub.add("org/Tiny", made / "tiny")
        hub.add("org/Tiny-bnb-4bit", copy)
        process = subprocess.run(
            [sys.executable, "-W", "error", "-c", FIND],
            env=hub.environment(tmp_path / "home"), cwd=Path(__file__).parents[2], capture_output=True, text=True,
        )  # fmt: skip
    assert process.stdout.split() == ["org/Tiny", "vendor/Tiny"], process.stderr
