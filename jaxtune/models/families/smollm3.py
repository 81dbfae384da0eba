"""SmolLM3: Llama with some layers (every fourth) that know no positions, NoPE."""

from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "smollm3"


def from_hf(hf: dict) -> ModelConfig:
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    kinds = shared.by_layer_types({**hf, "sliding_window": window})
    turned = zip(
        kinds, hf["no_rope_layers"], strict=True
    )  # 1 where the layer has a rope, whatever the name says
    return ModelConfig(
        **shared.sizes(hf),
        **shared.biases(hf),
        layers=tuple(kind if has_rope else kind._replace(rope=None) for kind, has_rope in turned),
        ropes=(shared.rope(hf),),
    )
