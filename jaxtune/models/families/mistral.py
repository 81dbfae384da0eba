"""Mistral 7B, Nemo and Small 3 (text): Llama, with one sliding window for all layers in the first version."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "mistral"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf), layers=shared.alike(hf, hf["sliding_window"]), ropes=(shared.rope(hf),)
    )
