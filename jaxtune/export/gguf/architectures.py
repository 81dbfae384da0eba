"""The architectures that llama.cpp has a graph for, each as what distinguishes it from the others, and which of them a
model is.

A file names its architecture, and llama.cpp knows the rest by itself: which norms there are, where the windows are,
whether embeddings are scaled. So a model fits one of these exactly or is refused.
"llama" serves many families.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxtune.errors import UnsupportedModelError
from jaxtune.models.config import LayerKind, ModelConfig, RopeConfig

ANY, SOME = object(), object()
"""Of a setting's values: whichever; whichever but None."""
_WITHOUT_EFFECT = {"max_position", "norm_rounds_last", "attention_multiplier"}
"""Settings that are no part of a graph, or that `_misfits` looks at more closely."""


def _plain(i: int) -> LayerKind:
    return LayerKind()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Architecture:
    """What llama.cpp computes under this name, beyond a Llama without biases."""

    name: str
    """`general.architecture`."""
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of ModelConfig that differ from the defaults, or may."""
    neighbours: bool = False
    """Rotary embeddings turn the pairs (2i, 2i + 1), not (i, i + D/2): rows of q and k change places."""
    partial_rotary: bool = False
    """Only some of a head's numbers may be turned."""
    factors: bool = False
    """Reads a factor for every frequency, so that any stretching can be said."""
    long_factors: bool = False
    """Reads two of them, of which the length of the context decides."""
    layer: Callable[[int], LayerKind] = _plain
    """What the i-th layer is; a window's size is the model's own."""
    multipliers: bool = False
    """Reads what scores, embeddings, residuals and logits are multiplied by."""
    attention_scale: Callable[[ModelConfig], float] = lambda c: c.head_dim**-0.5
    """What scores are multiplied by otherwise."""
    narrow_heads: bool = False
    """All heads together are as wide as the model."""
    tied: bool | None = None
    """Whether embedding and head are one; None if either will do."""

    @property
    def has_windows(self) -> bool:
        return self.layer(0).window is not None


def _of_27b(layers: int) -> Callable[[ModelConfig], float]:
    """Gemma's largest, known by its layers, takes the width of the model for each head, not that of the head."""
    return lambda c: (c.hidden_size // c.num_heads if c.num_layers == layers else c.head_dim) ** -0.5


_GEMMA = {"norm_adds_one": True, "activation": "gelu_tanh", "embedding_multiplier": ANY}
_WINDOW = 1  # of any size

ARCHITECTURES = (
    Architecture(name="qwen2", switches={"qkv_bias": True}, narrow_heads=True),
    Architecture(
        name="llama",
        switches={"qkv_bias": ANY, "o_bias": ANY, "mlp_bias": ANY},
        neighbours=True,
        factors=True,
        long_factors=True,
    ),
    Architecture(name="qwen3", switches={"qk_norm": "head"}),
    Architecture(name="gemma", switches=_GEMMA, tied=True),
    Architecture(
        name="gemma2",
        switches={**_GEMMA, "norms": "both", "attention_softcap": SOME, "logit_softcap": SOME},
        layer=lambda i: LayerKind(_WINDOW if i % 2 == 0 else None),
        attention_scale=_of_27b(layers=46),
        tied=True,
    ),
    Architecture(
        name="gemma3",
        switches={**_GEMMA, "norms": "both", "qk_norm": "head", "logit_softcap": ANY},
        layer=lambda i: LayerKind(_WINDOW, rope=1) if i % 6 < 5 else LayerKind(),
        attention_scale=_of_27b(layers=62),
    ),
    Architecture(
        name="phi3",
        switches={"fused_projections": True},
        partial_rotary=True,
        long_factors=True,
        narrow_heads=True,
    ),
    Architecture(
        name="granite",
        switches={
            "qkv_bias": ANY, "o_bias": ANY, "mlp_bias": ANY,
            "embedding_multiplier": ANY, "residual_multiplier": ANY, "logit_scale": ANY,
        },
        neighbours=True,
        factors=True,
        long_factors=True,
        multipliers=True,
    ),
    Architecture(
        name="olmo2", switches={"norms": "post", "qk_norm": "projection"}, narrow_heads=True, tied=False
    ),
    Architecture(
        name="smollm3",
        layer=lambda i: LayerKind(rope=None if i % 4 == 3 else 0),
        neighbours=True,
    ),
)  # fmt: skip


def architecture_of(c: ModelConfig) -> Architecture:
    """The first that computes this model: most of what is like a Llama can be written as one."""
    misfits = {architecture: list(_misfits(architecture, c)) for architecture in ARCHITECTURES}
    nearest = [each for each, found in misfits.items() if len(found) == min(map(len, misfits.values()))]
    if misfits[nearest[0]]:
        but_for = "; ".join(f"{each.name} but for {', '.join(misfits[each])}" for each in nearest)
        raise UnsupportedModelError(
            f"llama.cpp has no architecture that computes this model. It is {but_for}.",
            expected=f"one of {', '.join(architecture.name for architecture in ARCHITECTURES)}.",
            fix="Save it with save_pretrained_merged, for software that reads Hugging Face's format.",
        )
    return nearest[0]


def by_keys(rope: RopeConfig) -> bool:
    """Whether a few key/values say it, which every architecture reads. (yarn's borders are not among them.)"""
    usual = (rope.beta_fast, rope.beta_slow, rope.truncate) == (32, 1, True)
    return rope.kind in ("default", "linear") or (rope.kind == "yarn" and usual)


def _misfits(architecture: Architecture, c: ModelConfig) -> Iterator[str]:
    for field in dataclasses.fields(c):
        if field.default is dataclasses.MISSING or field.name in _WITHOUT_EFFECT:
            continue
        expected, found = architecture.switches.get(field.name, field.default), getattr(c, field.name)
        if expected is not ANY and (found is None if expected is SOME else found != expected):
            yield f"{field.name}={found!r}"
    if c.norm_adds_one and not math.isclose(c.embedding_multiplier, c.hidden_size**0.5, rel_tol=1e-6):
        yield f"embedding_multiplier={c.embedding_multiplier!r}"
    scale = architecture.attention_scale(c)
    if not architecture.multipliers and not math.isclose(c.attention_scale, scale, rel_tol=1e-6):
        yield f"scores multiplied by {c.attention_scale:.4g} (not {scale:.4g})"
    if architecture.narrow_heads and c.num_heads * c.head_dim != c.hidden_size:
        yield f"{c.num_heads} heads of {c.head_dim} in a width of {c.hidden_size}"
    if architecture.tied not in (None, c.tie_word_embeddings):
        yield "a head of its own" if architecture.tied else "a head that is the embedding"
    yield from _layer_misfits(architecture, c)
    for i, rope in enumerate(c.ropes):
        yield from _rope_misfits(architecture, c, i, rope)


def _layer_misfits(architecture: Architecture, c: ModelConfig) -> Iterator[str]:
    theirs = [architecture.layer(i) for i in range(c.num_layers)]
    if [kind.rope for kind in theirs] != [kind.rope for kind in c.layers]:
        yield "rotary embeddings in other layers"
    if architecture.has_windows:
        has_window = [kind.window is not None for kind in c.layers]
        if [kind.window is not None for kind in theirs] != has_window or len(set(c.windows) - {None}) > 1:
            yield "windows in other layers"


def _rope_misfits(architecture: Architecture, c: ModelConfig, i: int, rope: RopeConfig) -> Iterator[str]:
    if rope.dim not in (None, c.head_dim) and not architecture.partial_rotary:
        yield f"a rotary embedding of {rope.dim} of {c.head_dim} numbers"
    known = (
        rope.kind == "default" if i > 0
        else rope.kind in ("default", "linear") if len(c.ropes) > 1
        else by_keys(rope) or (architecture.long_factors if rope.kind == "longrope" else architecture.factors)
    )  # fmt: skip
    if not known:
        yield f"a rotary embedding of the kind {rope.kind!r}"
