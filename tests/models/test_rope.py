"""Rotary embeddings of every kind and spelling are transformers', on both sides of every border."""

import importlib
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from jaxtune import FastLanguageModel
from jaxtune.loading.config import read_config
from jaxtune.models import rope
from jaxtune.models.context import at_length
from jaxtune.models.families import FAMILIES
from tests.kit import families, models
from tests.kit.compare import assert_close

SIZES = {
    "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2,
    "intermediate_size": 64, "vocab_size": 99, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
OLD = {"rope_theta": 5e3}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "short_factor": np.linspace(1.0, 1.5, 16).tolist(),
    "long_factor": np.linspace(1.0, 9.0, 16).tolist(),
}
PHI = {"model_type": "phi3", "max_position_embeddings": 256, "original_max_position_embeddings": 64}
HALF = {"partial_rotary_factor": 0.5}
GEMMA = {"model_type": "gemma3_text", "head_dim": 64, "sliding_window": 8, "num_hidden_layers": 6}

# name: (what config.json says, the length that the model is set up for)
KINDS = {
    "default, old": (OLD, 64),
    "default, new": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, 64),
    "linear, old": ({**OLD, "rope_scaling": {"type": "linear", "factor": 4.0}}, 64),
    "linear, new": ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}, 64),
    "dynamic, at its border": ({**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 64),
    "dynamic, beyond": ({**OLD, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 65),
    "dynamic, far beyond": ({**OLD, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, 250),
    "llama3": ({"rope_parameters": models.LLAMA3_ROPE, "max_position_embeddings": 256}, 256),
    "yarn": ({**OLD, "rope_scaling": YARN, "max_position_embeddings": 256}, 256),
    "yarn, type, original length unsaid": ({**OLD, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 64),
    "yarn, its own attention factor": (
        {**OLD, "rope_scaling": {**YARN, "attention_factor": 1.25}, "max_position_embeddings": 256}, 256,
    ),
    "yarn, mscale as DeepSeek's": (
        {**OLD, "rope_scaling": {**YARN, "mscale": 0.8, "mscale_all_dim": 0.4}, "max_position_embeddings": 256}, 256,
    ),
    "yarn, borders not rounded": (
        {**OLD, "rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2, "truncate": False}}, 256,
    ),
    "phi3, half of each head": ({**PHI, **HALF}, 64),
    "longrope, at its border": ({**PHI, "rope_scaling": {"type": "longrope", **LONG}, **HALF}, 64),
    "longrope, beyond": ({**PHI, "rope_scaling": {"type": "longrope", **LONG}, **HALF}, 65),
    "longrope, its own attention factor": (
        {
            **PHI,
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.1, **HALF, **LONG,
            },
        },
        256,
    ),
    "gemma3, old": (
        {
            **GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 1e3,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3,
        },
        64,
    ),
    "gemma3, new": (
        {**GEMMA, "rope_parameters": families.LOCAL_GLOBAL, "layer_types": ["sliding_attention", "full_attention"] * 3},
        64,
    ),
}  # fmt: skip


def their_tables(folder, length):
    """cos and sin of each kind of layer, from transformers' own module; the one that sees everything first."""
    config = AutoConfig.from_pretrained(folder)
    kind = config.model_type.removesuffix("_text")
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    embedding = getattr(module, f"{kind.capitalize()}RotaryEmbedding")(config)
    layers = [["full_attention"], ["sliding_attention"]] if kind == "gemma3" else [[]]
    for layer in layers:
        cos, sin = embedding(torch.zeros(1), torch.arange(length)[None], *layer)
        half = cos.shape[-1] // 2
        yield cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_cos_and_sin(kind, tmp_path):
    settings, length = KINDS[kind]
    settings = {"model_type": "llama", **SIZES, **settings}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    hf = read_config(tmp_path, supported=FAMILIES)
    c = at_length(FAMILIES[hf["model_type"]](hf), length)
    positions = np.arange(length, dtype=np.int32)[None]
    theirs = list(their_tables(tmp_path, length))
    assert len(theirs) == len(c.ropes)
    for ours, (cos, sin) in zip(c.ropes, theirs, strict=True):
        mine = rope.tables(positions, rope.frequencies(ours, c.head_dim), ours.attention_factor)
        for table, expected in zip(mine, (cos, sin), strict=True):
            assert_close(table[0, :, 0], expected, 1e-5)


@pytest.fixture(scope="module", params=["dynamic", "longrope"])
def by_length(request, tmp_path_factory):
    """A model whose rope changes beyond 64 tokens."""
    case = "phi4-mini" if request.param == "longrope" else "llama, dynamic"
    theirs = families.random_model(case)
    return models.save(theirs, tmp_path_factory.mktemp("length") / "model"), theirs


@pytest.mark.parametrize("length", [64, 96])
def test_logits_at_the_length_that_the_model_is_set_up_for(by_length, length):
    folder, theirs = by_length
    ids = np.random.default_rng(length).integers(5, models.VOCAB, (1, length)).astype(np.int32)
    ours, _ = FastLanguageModel.from_pretrained(
        folder, dtype="float32", load_in_4bit=False, max_seq_length=length
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids).long()).logits.numpy()
    assert_close(ours.apply(ours.params, None, ids), expected, 1e-5)
