"""SmolLM3: Llama with some layers (every fourth) that know no positions, NoPE."""

from jaxtune.errors import ConfigError
from jaxtune.models.config import ModelConfig
from jaxtune.models.families import shared

MODEL_TYPE = "smollm3"


def from_hf(hf: dict) -> ModelConfig:
    window = hf["sliding_window"] if hf["use_sliding_window"] else None
    kinds = shared.by_layer_types({**hf, "sliding_window": window})
    has_ropes = hf["no_rope_layers"]  # 1 where the layer has a rope, whatever the name says
    if len(has_ropes) != len(kinds):
        raise ConfigError(
            f"config: no_rope_layers has {len(has_ropes)} entries for {len(kinds)} layers.",
            expected="one for each layer.",
            fix="Repair no_rope_layers in config.json, or download the model again.",
        )
    return ModelConfig(
        **shared.sizes(hf),
        **shared.biases(hf),
        layers=tuple(
            kind if has_rope else kind._replace(rope=None)
            for kind, has_rope in zip(kinds, has_ropes, strict=True)
        ),
        ropes=(shared.rope(hf),),
    )
