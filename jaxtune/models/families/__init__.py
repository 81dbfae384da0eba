"""One small file per family: `MODEL_TYPE` and `from_hf`, over the shared parts."""

from collections.abc import Callable

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import (
    gemma,
    gemma2,
    gemma3_text,
    granite,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)

_ALL = (gemma, gemma2, gemma3_text, granite, llama, mistral, olmo2, phi3, qwen2, qwen3, smollm3)

FAMILIES: dict[str, Callable[[dict], ModelConfig]] = {family.MODEL_TYPE: family.from_hf for family in _ALL}
"""Hugging Face's `model_type` -> the translation of its config."""
