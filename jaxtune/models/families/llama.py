"""Llama 1 to 3.3, and what shares its architecture: TinyLlama, Yi, SmolLM2, DeepSeek-R1's Llama distillations."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "llama"


def from_hf(hf: dict) -> ModelConfig:
    """A `LlamaConfig` as a dict, with transformers' defaults filled in -> ModelConfig."""
    return ModelConfig(
        **shared.sizes(hf), **shared.biases(hf), layers=shared.alike(hf), ropes=(shared.rope(hf),)
    )
