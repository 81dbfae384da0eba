"""A model set up for the length that was asked for.

What depends on the length of a sequence in transformers is decided once, here: `dynamic` stretches for `length`, and
`longrope` takes its long factors if `length` exceeds the original one (vLLM decides so too). A model without scaling of
its own that was trained for less is stretched linearly, by the ratio, as Unsloth does.
"""

import dataclasses
from typing import Any

from jaxtune.log import get_logger
from jaxtune.models.config import ModelConfig

log = get_logger(__name__)


def at_length(c: ModelConfig, length: int) -> ModelConfig:
    """The same model for sequences of up to `length` tokens."""
    ropes = [
        dataclasses.replace(rope, length=length) if rope.kind in ("dynamic", "longrope") else rope
        for rope in c.ropes
    ]
    # What yarn was set up for may exceed what the config calls the model's maximum (Qwen 2.5's instructions).
    set_up = [int(rope.original_max_position * rope.factor) for rope in ropes if rope.kind == "yarn"]
    trained = max([c.max_position, *set_up])
    if not 0 < trained < length:
        return dataclasses.replace(c, ropes=tuple(ropes), max_position=max(c.max_position, length))
    # A rope that only serves windows meets no distance that it was not trained for.
    far = {kind.rope for kind in c.layers if kind.window is None or kind.window > trained} - {None}
    plain = [i for i in far if i is not None and ropes[i].kind == "default"]
    for i in plain:
        ropes[i] = dataclasses.replace(
            ropes[i], kind="linear", factor=length / trained, original_max_position=trained
        )
    if plain:
        log.info(
            "This model was trained for %d tokens: its rotary embedding is stretched by %.4g, for the %d of "
            "max_seq_length.", trained, length / trained, length,
        )  # fmt: skip
    elif any(ropes[i].kind != "dynamic" for i in far if i is not None):
        log.warning(
            "This model was trained for %d tokens and scales its rotary embedding already: it is left as it is, and "
            "answers beyond that length may be poor.", trained,
        )  # fmt: skip
    return dataclasses.replace(c, ropes=tuple(ropes), max_position=length)


def as_hf(settings: dict[str, Any], c: ModelConfig) -> dict[str, Any]:
    """The settings of the model's config.json, for the model as it was stretched, in its length or its vocabulary: what
    was trained is what is said."""
    if settings["vocab_size"] != c.vocab_size:
        settings = {**settings, "vocab_size": c.vocab_size}
    stretched = [rope for rope in c.ropes if rope.kind == "linear" and rope.original_max_position]
    if not stretched:
        return settings
    factor = stretched[0].factor
    said: dict[str, Any] = {"rope_type": "linear", "factor": factor}
    if settings["model_type"] == "phi3":  # whose config knows longrope only
        same = [factor] * ((stretched[0].dim or c.head_dim) // 2)
        said = {"rope_type": "longrope", "short_factor": same, "long_factor": same, "attention_factor": 1.0}
    settings = {**settings, "max_position_embeddings": c.max_position}
    given = settings.get("rope_parameters")
    if not given:
        return {**settings, "rope_scaling": {**said, "type": said["rope_type"]}}
    if "full_attention" in given:
        return {
            **settings,
            "rope_parameters": {**given, "full_attention": {**given["full_attention"], **said}},
        }
    return {**settings, "rope_parameters": {**given, **said}}
