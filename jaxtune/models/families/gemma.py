"""Gemma 1: norms by 1 + weight, a GELU gate, embeddings scaled by the root of their width."""

from typing import Any

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "gemma"


def switches(hf: dict) -> dict[str, Any]:
    """What every Gemma has."""
    shared.refuse(hf, "use_bidirectional_attention")
    return dict(
        **shared.biases(hf),
        norm_adds_one=True,
        norm_rounds_last=True,
        embedding_multiplier=hf["hidden_size"] ** 0.5,
    )


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(**shared.sizes(hf), **switches(hf), layers=shared.alike(hf), ropes=(shared.rope(hf),))
