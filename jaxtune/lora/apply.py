"""What an adapter does to a linear: y = x W^T + s B (A x), in the dtype of x, with A and B kept in float32. With DoRA
each output is then scaled by m / |W + s B A|, its row's trained length over its own.

An adapter, as the model reads it for one layer (see `tree.with_settings`), is a [r, in], b [out, r], scale []; perhaps
m [out] and bias [out], with `has_m` and `has_bias` [], whether this layer does; perhaps a key `dropout` with `keep` [];
perhaps `squares` [in] (see `watch`).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.lora.watch import watched

Adapter = dict[str, jax.Array]


def product(
    x: jax.Array, weight: Any, adapter: Adapter | None, matmul: Callable, ax: jax.Array | None = None
) -> jax.Array:
    """x [..., in] -> [..., out]; `matmul(x, weight)` is x W^T for whatever kind of weight this is. `ax` is A x where
    `inner_products` has it already."""
    if adapter is not None and "squares" in adapter:
        x = watched(x, adapter["squares"])
    y = matmul(x, weight)
    if adapter is None or "a" not in adapter:
        return y
    if ax is not None:
        return y + outer(ax, adapter)
    kept = _drop(x, adapter)
    if "m" not in adapter:
        return y + delta(kept, adapter)
    # PEFT lets dropout reach the part of W x that m changes, but not W x itself.
    base = y if kept is x else matmul(kept, weight)
    factor = _factor(weight, adapter).reshape((1,) * (y.ndim - 1) + (-1,))
    return y + (factor - 1).astype(y.dtype) * base + factor.astype(y.dtype) * delta(kept, adapter)


def inner_products(x: jax.Array, adapters: Sequence[Adapter | None]) -> Sequence[jax.Array | None]:
    """A x [..., r] of plain adapters of one x, in one product: they are narrow, and what each would cost is to read x.
    None for each if not all are plain."""
    if not all(adapter is not None and "a" in adapter and is_plain(adapter) for adapter in adapters):
        return [None] * len(adapters)
    factors = [adapter["a"] for adapter in adapters if adapter is not None]
    ends = list(itertools.accumulate(len(a) for a in factors))
    return jnp.split(x @ jnp.concatenate(factors).astype(x.dtype).T, ends[:-1], axis=-1)


def delta(x: jax.Array, adapter: Adapter) -> jax.Array:
    """s B (A x)."""
    return outer(x @ adapter["a"].astype(x.dtype).T, adapter)


def outer(ax: jax.Array, adapter: Adapter) -> jax.Array:
    """s B (A x) of A x."""
    # Scaled in float32: alpha / r may have no 16-bit value.
    return ax @ (adapter["scale"] * adapter["b"]).astype(ax.dtype).T


def changed_rows(rows: jax.Array, tokens: jax.Array, adapter: Adapter) -> jax.Array:
    """Rows W[t] of an embedding, in their dtype: W[t] + s B[t] A, summed in float32. Nothing is dropped, as in PEFT."""
    change = adapter["scale"] * adapter["b"][tokens] @ adapter["a"]
    return (rows.astype(jnp.float32) + change).astype(rows.dtype)


def parts(
    x: jax.Array, weight: jax.Array, adapter: Adapter
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The product as a sum of products x W^T that are still to be taken: ((x, A x), (W, s B))."""
    a, b = adapter["a"].astype(x.dtype), (adapter["scale"] * adapter["b"]).astype(x.dtype)
    return (x, _drop(x, adapter) @ a.T), (weight, b)


def bias(own: jax.Array, adapter: Adapter | None) -> jax.Array:
    """The bias [out] that holds: the trained one where there is one."""
    if adapter is None or "bias" not in adapter:
        return own
    return jnp.where(adapter["has_bias"], adapter["bias"], own.astype(jnp.float32))


def dense(weight: Any) -> jax.Array:
    """A weight in float32, packed or not."""
    return weight.dequantize(jnp.float32) if hasattr(weight, "dequantize") else weight.astype(jnp.float32)


def row_lengths(weight_OI: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    """|W + s B A| of each row, float32 [out]."""
    return jnp.linalg.norm(weight_OI + scale * jnp.matmul(b, a, precision="highest"), axis=-1)


def _factor(weight, adapter):
    # The length is a constant to the gradient, as in the paper (4.3), and in PEFT.
    a, b = lax.stop_gradient((adapter["a"], adapter["b"]))
    lengths = lax.stop_gradient(row_lengths(dense(weight), a, b, adapter["scale"]))
    lengths = jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)
    return jnp.where(adapter["has_m"], adapter["m"] / lengths, 1.0)


def is_plain(adapters: Any) -> bool:
    """Whether all linears of a part of the adapter's tree do the same to each token by itself, at a cost in proportion:
    nothing is dropped, no row of a weight is measured."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(adapters)]
    return not any(path[-1].key in ("dropout", "m") for path in paths)


def _drop(x, adapter):
    if "dropout" not in adapter:
        return x
    kept = jax.random.bernoulli(adapter["dropout"], adapter["keep"], x.shape)
    return jnp.where(kept, x / adapter["keep"].astype(x.dtype), 0)
