"""A model stretched beyond what it was trained for, by a rule, with one message, and said so when it is saved."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.models.config import LayerKind, RopeConfig
from jaxtune.models.context import at_length
from tests.kit import families, models, tiny
from tests.kit.compare import assert_close, relative_rms

PLAIN = RopeConfig(theta=1e4)
STRETCHED = RopeConfig(theta=1e4, kind="linear", factor=3.0, original_max_position=64)
LLAMA3 = RopeConfig(theta=1e4, kind="llama3", factor=8.0, high_freq_factor=4.0, original_max_position=32)
YARN = RopeConfig(theta=1e4, kind="yarn", factor=4.0, original_max_position=64)
DYNAMIC = RopeConfig(theta=1e4, kind="dynamic", factor=2.0, original_max_position=64, length=64)


def trained_for_64(*kinds, ropes=(PLAIN,)):
    return tiny.model(layers=kinds or (LayerKind(),), ropes=ropes, max_position=64).config


# what it is, trained for 64: (the model, its ropes when it is set up for 192, the level of the message)
RULES = {
    "no scaling": (trained_for_64(), (STRETCHED,), logging.INFO),
    "a rope for windows alone is kept": (
        trained_for_64(LayerKind(8, 1), LayerKind(None, 0), ropes=(PLAIN, PLAIN)), (STRETCHED, PLAIN), logging.INFO,
    ),
    "one rope for both": (trained_for_64(LayerKind(8), LayerKind()), (STRETCHED,), logging.INFO),
    "windows only": (trained_for_64(LayerKind(8)), (PLAIN,), None),
    "no positions where everything is seen": (trained_for_64(LayerKind(8), LayerKind(None, None)), (PLAIN,), None),
    "scaling of its own": (trained_for_64(ropes=(LLAMA3,)), (LLAMA3,), logging.WARNING),
    "yarn that reaches as far": (trained_for_64(ropes=(YARN,)), (YARN,), None),
    "yarn that does not": (
        trained_for_64(ropes=(dataclasses.replace(YARN, factor=2.0),)), (dataclasses.replace(YARN, factor=2.0),),
        logging.WARNING,
    ),
    "dynamic": (trained_for_64(ropes=(DYNAMIC,)), (dataclasses.replace(DYNAMIC, length=192),), None),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, caplog):
    model, ropes, level = RULES[rule]
    with caplog.at_level(logging.INFO, "jaxtune"):
        longer = at_length(model, 192)
    assert longer == dataclasses.replace(model, ropes=ropes, max_position=192)
    assert [record.levelno for record in caplog.records] == ([] if level is None else [level])


@pytest.mark.parametrize("length", [16, 64])
def test_within_what_it_was_trained_for_nothing_changes(length, caplog):
    with caplog.at_level(logging.INFO, "jaxtune"):
        assert at_length(trained_for_64(), length) == trained_for_64()
    assert not caplog.records


def test_a_length_that_nobody_asked_for_stretches_nothing(tmp_path):
    folder = models.save(families.random_model("mistral nemo"), tmp_path / "model")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    assert model.max_seq_length == model.causal_lm.config.max_position == 256
    assert model.causal_lm.config.ropes[0].kind == "default"


@pytest.mark.parametrize("model_type", families.EACH)
def test_every_family_is_stretched_with_one_message(model_type, tmp_path, caplog):
    """Unless all that it sees is a window."""
    case = families.EACH[model_type]
    folder = models.save(families.random_model(case, rope_parameters=None), tmp_path / "model")
    with caplog.at_level(logging.INFO, "jaxtune"):
        model, _ = FastLanguageModel.from_pretrained(
            folder, dtype="float32", load_in_4bit=False, max_seq_length=1024
        )
    assert model.max_seq_length == model.causal_lm.config.max_position == 1024
    said = [record.getMessage() for record in caplog.records]
    if all(kind.window for kind in model.causal_lm.config.layers):
        assert not said
    else:
        assert len(said) == 1 and "trained for 256 tokens" in said[0] and "stretched by 4" in said[0]
        assert (model.causal_lm.config.ropes[0].kind, model.causal_lm.config.ropes[0].factor) == ("linear", 4)


@pytest.mark.parametrize("case", ["mistral nemo", "phi3", "gemma3_text, old"])
def test_the_merged_folder_is_the_stretched_model(case, tmp_path):
    """Whether its config.json spells the rope in the old way or the new, for one rope or two."""
    theirs = families.random_model(case.removesuffix(", old"), rope_parameters=None)
    folder = models.save(theirs, tmp_path / "model")
    if case.endswith("old"):
        families.spell_rope_as_before(folder)
    ids = np.random.default_rng(0).integers(5, models.VOCAB, (1, 40)).astype(np.int32)
    model, _ = FastLanguageModel.from_pretrained(
        folder, dtype="float32", load_in_4bit=False, max_seq_length=1024
    )
    model.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    assert merged.config.max_position_embeddings == 1024
    with torch.no_grad():
        before, after = (m(torch.from_numpy(ids).long()).logits.numpy() for m in (theirs, merged))
    assert relative_rms(after, before) > 1e-3, "the stretch must matter"
    assert_close(model.apply(model.params, None, ids), after, 1e-5)
