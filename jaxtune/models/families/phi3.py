"""Phi-3, Phi-3.5 and Phi-4 (mini too): Llama with fused projections, part of each head turned, longrope, a window."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "phi3"


def from_hf(hf: dict) -> ModelConfig:
    turned = int(shared.head_dim(hf) * shared.number(hf["rope_parameters"], "partial_rotary_factor", 1.0))
    return ModelConfig(
        **shared.sizes(hf),
        layers=shared.alike(hf, hf["sliding_window"]),
        ropes=(shared.rope(hf, dim=turned),),
        fused_projections=True,
    )
