"""Granite 3, dense: Llama with multipliers on embeddings, scores, residuals and logits."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "granite"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf),
        **shared.biases(hf),
        layers=shared.alike(hf),
        ropes=(shared.rope(hf),),
        embedding_multiplier=shared.number(hf, "embedding_multiplier"),
        attention_multiplier=shared.number(hf, "attention_multiplier"),
        residual_multiplier=shared.number(hf, "residual_multiplier"),
        logit_scale=1 / shared.number(hf, "logits_scaling"),
    )
