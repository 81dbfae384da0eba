"""The architecture of a decoder, as one frozen value. Families translate a Hugging Face config into it."""

import dataclasses
import functools
import itertools
import math
from typing import Literal, NamedTuple

from jaxtune.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base, and how its wavelengths are stretched. `models/rope.py` has the formulas."""

    theta: float
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    dim: int | None = None
    """How many of a head's numbers are turned, from the first on; None is all."""
    factor: float = 1.0
    """By how much the kind stretches."""
    attention_factor: float = 1.0
    """What cos and sin are multiplied by (yarn, longrope)."""
    original_max_position: int = 0
    """Positions that the model saw before its wavelengths were stretched."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    """llama3: where the long and the short wavelengths begin."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """yarn: turns within the original length above which, and below which, a wavelength is kept or stretched whole;
    whether the border between them is rounded to whole dimensions."""
    short_divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    """longrope: what each frequency is divided by within the original length, and beyond it."""
    length: int = 0
    """dynamic, longrope: the longest sequence that the model is set up for (`models/context.py`), which decides."""


class LayerKind(NamedTuple):
    """What may differ from layer to layer."""

    window: int | None = None
    """How far back attention sees; None is everything."""
    rope: int | None = 0
    """Which of the model's `ropes` turns queries and keys; None is none of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a decoder with grouped-query attention and a gated MLP; the defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    layers: tuple[LayerKind, ...]
    """One for each layer."""
    ropes: tuple[RopeConfig, ...]
    max_position: int = 0
    """The longest sequence that the model was trained for, or was stretched to."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    """Biases on q, k and v; on o; on gate, up and down."""
    fused_projections: bool = False
    """q, k and v are one linear, `qkv_proj`; gate and up are one, `gate_up_proj`."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    norms: Literal["pre", "post", "both"] = "pre"
    """Whether attention and MLP have their norm before them, after them (before the sum), or both."""
    norm_adds_one: bool = False
    """Norms multiply by 1 + weight."""
    norm_rounds_last: bool = False
    """Norms multiply in float32 and round the product; Llama's round first."""
    qk_norm: Literal["head", "projection"] | None = None
    """A norm on queries and keys: over each head, or over the whole projection."""
    attention_multiplier: float | None = None
    """What scores are multiplied by; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    """Scores become cap tanh(score / cap)."""
    embedding_multiplier: float = 1.0
    """What embeddings are multiplied by; rounded to their dtype first, as transformers does."""
    residual_multiplier: float = 1.0
    """What attention and MLP are multiplied by before they are added."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    """Logits are scaled, then become cap tanh(logit / cap)."""

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"config: {name} is {getattr(self, name)}.",
                    expected="a positive number.",
                    fix="Repair config.json, or download the model again.",
                )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"config: {self.num_heads} attention heads over {self.num_kv_heads} key/value heads.",
                expected="a number of heads that is a multiple of the number of key/value heads.",
                fix="Repair num_attention_heads or num_key_value_heads in config.json.",
            )
        if not self.layers or any(kind.window is not None and kind.window < 1 for kind in self.layers):
            raise ConfigError(
                f"config: {len(self.layers)} layers with the windows {sorted({k.window or 0 for k in self.layers})}.",
                expected="at least one layer, and windows of at least one token.",
                fix="Repair num_hidden_layers or sliding_window in config.json.",
            )
        for rope in self.ropes:
            dim = self.head_dim if rope.dim is None else rope.dim
            if dim % 2 or not 0 < dim <= self.head_dim:
                raise ConfigError(
                    f"config: rotary embeddings turn {dim} of a head's {self.head_dim} numbers.",
                    expected="an even number of them: rotary embeddings turn pairs.",
                    fix="Repair head_dim (or hidden_size / num_attention_heads, partial_rotary_factor) in config.json.",
                )

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The layers' windows, each once."""
        return tuple(dict.fromkeys(kind.window for kind in self.layers))

    @property
    def attention_scale(self) -> float:
        given = self.attention_multiplier
        return 1 / math.sqrt(self.head_dim) if given is None else given

    @functools.cached_property
    def segments(self) -> tuple[tuple[range, int], ...]:
        """Stretches of layers that repeat, each with its period: the super-block that is compiled once and scanned.

        Whole repetitions of the pattern, then what is left: 26 layers of period 6 are
        `((range(0, 24), 6), (range(24, 26), 2))`. Layers without a pattern that repeats (all of one kind, then all of
        another) are cut where the kind changes. `layers[s][p]` of the model stacks `segments[s][0][p::period]`."""
        n, kinds = self.num_layers, self.layers
        period = next(p for p in range(1, n + 1) if kinds[p:] == kinds[: n - p])
        if period <= n // 2 or n == 1:
            whole = n // period * period
            cuts = [(range(whole), period), (range(whole, n), n - whole)]
        else:
            lengths = [len(list(run)) for _, run in itertools.groupby(kinds)]
            ends = itertools.accumulate(lengths)
            cuts = [(range(end - length, end), 1) for end, length in zip(ends, lengths, strict=True)]
        return tuple((layers, p) for layers, p in cuts if layers)
