"""OLMo 2: norms after attention and MLP only, and over the whole projections of queries and keys."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "olmo2"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf),
        **shared.biases(hf),
        layers=shared.alike(hf),
        ropes=(shared.rope(hf),),
        norms="post",
        norm_rounds_last=True,
        qk_norm="projection",
    )
