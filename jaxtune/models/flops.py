"""The arithmetic that a step of training cannot do without, whatever it computes again: what MFU counts."""

from collections import Counter
from collections.abc import Sequence

from jaxtune.models.config import ModelConfig


def useful_flops(c: ModelConfig, lengths: Sequence[int], *, full: bool = False) -> float:
    """Of one step over samples of these lengths, 4 N T + 3 A: frozen weights need no gradient of their own (trained
    ones do: 6 N T); A is causal attention's forward pass. N counts linears and head; adapters are left out."""
    attention_weights = c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    linear = c.num_layers * (attention_weights + 3 * c.hidden_size * c.intermediate_size)
    linear += c.vocab_size * c.hidden_size
    windows = Counter(kind.window for kind in c.layers)
    seen = sum(layers * _pairs(length, window) for window, layers in windows.items() for length in lengths)
    attention = 4 * c.num_heads * c.head_dim * seen  # 2 for each of two products
    return (6 if full else 4) * linear * sum(lengths) + 3 * attention


def _pairs(length: int, window: int | None) -> float:
    """Tokens that see one another: half are masked, and what lies before a window."""
    beyond = 0 if window is None else max(0, length - window)
    return (length**2 - beyond**2) / 2
