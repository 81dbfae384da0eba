"""Qwen 3, dense: Llama with a norm over each head of queries and keys."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "qwen3"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf),
        **shared.biases(hf),
        layers=shared.by_layer_types(hf),
        ropes=(shared.rope(hf),),
        qk_norm="head",
    )
