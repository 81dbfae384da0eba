"""One small file per family: `MODEL_TYPE` and `from_hf`, over the shared parts."""

from collections.abc import Callable

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import llama

FAMILIES: dict[str, Callable[[dict], ModelConfig]] = {llama.MODEL_TYPE: llama.from_hf}
"""Hugging Face's `model_type` -> the translation of its config."""
