"""How large a model's GGUF files are, which follows from its shapes."""

import math
from typing import NamedTuple

import jax

from jaxtune.export.gguf import tensors
from jaxtune.export.gguf.architectures import architecture_of
from jaxtune.export.gguf.mixtures import MIXTURES, tensor_types
from jaxtune.export.gguf.quants import nbytes
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import LayerKind, ModelConfig, RopeConfig

LLAMA_8B = ModelConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
    rms_norm_eps=1e-5, tie_word_embeddings=False, layers=(LayerKind(),) * 32, ropes=(RopeConfig(theta=5e5),),
)  # fmt: skip
"""Llama 3.1 8B, as far as shapes go."""


class Size(NamedTuple):
    bits: float
    """For each number of the model."""
    nbytes: int
    needs_importance: bool


def sizes(c: ModelConfig) -> dict[str, Size]:
    """By method."""
    hf_shapes: dict[str, tuple[int, ...]] = {}
    for place, leaf in jax.tree_util.tree_leaves_with_path(CausalLM(c).skeleton):
        path = names.keys(place)
        shape = leaf.shape[1:] if names.is_stacked(path) else leaf.shape
        hf_shapes |= dict.fromkeys(names.hf_names(c, path), shape)
    gguf_names = tensors.gguf_names(c, hf_shapes, "the model")
    shapes = {name: hf_shapes[hf_name] for name, hf_name in gguf_names.items()}
    numbers = sum(map(math.prod, shapes.values()))
    layout = tensors.layout(architecture_of(c), c)
    found = {}
    for method, mixture in MIXTURES.items():
        types = tensor_types(
            method, shapes, layout, weighted=mixture.needs_importance, say=lambda *said: None
        )
        size = sum(nbytes(shape, types[name]) for name, shape in shapes.items())
        found[method] = Size(8 * size / numbers, size, mixture.needs_importance)
    return found
