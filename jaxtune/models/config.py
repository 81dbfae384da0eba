"""The architecture of a decoder, as one frozen value. Families translate a Hugging Face config into it."""

import dataclasses
import math

from jaxtune.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base and, for Llama 3, how long wavelengths are stretched."""

    theta: float
    kind: str = "default"
    """"default" or "llama3"."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of a pre-norm decoder with grouped-query attention and a gated MLP."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    """Biases on q, k, v and o."""
    mlp_bias: bool
    """Biases on gate, up and down."""
    windows: tuple[int | None, ...]
    """For each layer, how far back attention sees; None is everything. Its length is the number of layers."""
    period: int = 1
    """Layers in one repetition of the pattern of `windows`: the super-block that is compiled once and scanned."""
    max_position: int = 0
    """The longest sequence that the model was trained for."""

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
        pattern = (self.windows[: self.period] * self.num_layers)[: self.num_layers]
        if self.windows != pattern:
            raise ConfigError(
                f"config: the windows {self.windows} do not repeat every {self.period} layers.",
                expected="a pattern: layers at the same place of its period are alike.",
                fix="Set period to the length of the pattern.",
            )
        if self.head_dim % 2:
            raise ConfigError(
                f"config: head_dim is {self.head_dim}.",
                expected="an even head_dim: rotary embeddings turn pairs.",
                fix="Repair head_dim (or hidden_size / num_attention_heads) in config.json.",
            )

    @property
    def num_layers(self) -> int:
        return len(self.windows)

    @property
    def attention_scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def segments(self) -> tuple[tuple[range, int], ...]:
        """Whole repetitions of the pattern, then what is left: 26 layers of period 6 are
        `((range(0, 24), 6), (range(24, 26), 2))`. `layers[s][p]` of the model stacks `segments[s][0][p::period]`."""
        n = self.num_layers
        whole = n // self.period * self.period
        both = ((range(whole), self.period), (range(whole, n), n - whole))
        return tuple((layers, period) for layers, period in both if layers)
