"""How a file says what its rotary embedding is: key/values for what llama.cpp has a formula for, tensors of factors by
which every frequency is slowed for the rest."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxtune.export.gguf.architectures import Architecture, by_keys
from jaxtune.models.config import ModelConfig
from jaxtune.models.rope import frequencies

FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"


def keys(architecture: Architecture, c: ModelConfig) -> dict[str, Any]:
    """Everything under `<architecture>.rope.`, without that prefix."""
    rope = c.ropes[0]
    found: dict[str, Any] = {
        "dimension_count": np.uint32(c.head_dim if rope.dim is None else rope.dim),
        "freq_base": np.float32(rope.theta),
    }
    if architecture.has_windows:
        # Layers with a window turn by the last of the ropes: their own, or the only one.
        found["freq_base_swa"] = np.float32(c.ropes[-1].theta)
    attention_factor = rope.attention_factor
    if rope.kind == "longrope" or (rope.kind != "default" and by_keys(rope)):
        found["scaling.type"] = rope.kind
        if rope.kind != "longrope":
            found["scaling.factor"] = np.float32(rope.factor)
        if rope.kind != "linear":
            found["scaling.original_context_length"] = np.uint32(rope.original_max_position)
        if rope.kind == "yarn":  # which comes with a factor of its own
            attention_factor /= 1 + 0.1 * math.log(rope.factor)
    if not math.isclose(attention_factor, 1, rel_tol=1e-6):
        found["scaling.attn_factor"] = np.float32(attention_factor)
    return found


def tensors(c: ModelConfig) -> dict[str, np.ndarray]:
    """By GGUF name, float32 [turned dimensions / 2]."""
    rope = c.ropes[0]
    if rope.kind == "longrope":
        divisors = {LONG_FACTORS: rope.long_divisors, SHORT_FACTORS: rope.short_divisors}
        return {name: np.asarray(each, np.float32) for name, each in divisors.items()}
    if by_keys(rope):
        return {}
    plain = dataclasses.replace(rope, kind="default")
    return {FACTORS: frequencies(plain, c.head_dim) / frequencies(rope, c.head_dim)}
