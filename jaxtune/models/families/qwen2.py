"""Qwen 2 and 2.5, and DeepSeek-R1's Qwen distillations: Llama with biases on q, k and v; windows if switched on."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "qwen2"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf), layers=shared.by_layer_types(hf), ropes=(shared.rope(hf),), qkv_bias=True
    )
