"""Gemma 2: Gemma with norms on both sides, soft caps on scores and logits, and windows in every other layer."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import gemma, shared

MODEL_TYPE = "gemma2"


def from_hf(hf: dict) -> ModelConfig:
    return ModelConfig(
        **shared.sizes(hf, activation="hidden_activation"),
        **gemma.switches(hf),
        layers=shared.by_layer_types(hf),
        ropes=(shared.rope(hf),),
        norms="both",
        attention_multiplier=shared.number(hf, "query_pre_attn_scalar") ** -0.5,
        attention_softcap=hf["attn_logit_softcapping"],
        logit_softcap=hf["final_logit_softcapping"],
    )
