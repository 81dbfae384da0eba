"""Gemma 3, text only: Gemma 2 with norms on queries and keys in place of the cap on scores, and a rope of its own for
the layers with a window. (transformers has a cap on scores in this config and does not use it.)"""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import gemma, shared

MODEL_TYPE = "gemma3_text"


def from_hf(hf: dict) -> ModelConfig:
    parameters = hf["rope_parameters"]
    return ModelConfig(
        **shared.sizes(hf, activation="hidden_activation"),
        **gemma.switches(hf),
        layers=shared.by_layer_types(hf, local_rope=1),
        ropes=(
            shared.rope(hf, parameters["full_attention"]),
            shared.rope(hf, parameters["sliding_attention"]),
        ),
        norms="both",
        qk_norm="head",
        attention_multiplier=shared.number(hf, "query_pre_attn_scalar") ** -0.5,
        logit_softcap=hf["final_logit_softcapping"],
    )
