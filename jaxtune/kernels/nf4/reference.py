"""NF4 and FP4 in plain XLA: quantise, dequantise. This is what CPU and every GPU without a kernel run, and what kernels
are held to. All arithmetic is float32 in bitsandbytes' order: codes, scales and values are bit-equal to its own.

Shapes: N = out, K = in, NB = blocks of 64 in all, G = groups of 256 blocks.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.kernels.nf4.layout import BLOCK, DYNAMIC_MAP, GROUP, TABLES, ZERO_CODES, is_planar, pack, unpack

_MAP_EDGES = (DYNAMIC_MAP[:-1] + DYNAMIC_MAP[1:]) / 2


def quantize(
    w_NK: jax.Array, *, values: str, double: bool
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    """w [N, K] -> packed codes uint8, absmax [N, K/64] (flat: [NB]), nested_absmax f32 [G], offset f32 [].

    `double` quantises the scales as well: absmax is then uint8. Without, it is float32, and the last two are None."""
    shape = w_NK.shape
    assert len(shape) == 2, shape
    flat = w_NK.astype(jnp.float32).reshape(-1)
    blocks = jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)
    absmax = jnp.abs(blocks).max(axis=1)
    # The reciprocal, then a product: two roundings, as bitsandbytes. A block of zeros gets the code of zero everywhere.
    divisor = jnp.where(absmax > 0, absmax, 1.0)
    inverse = lax.optimization_barrier(1.0 / divisor)
    scaled = blocks * inverse[:, None]
    if flat.size % BLOCK:  # the short last block, though, bitsandbytes divides
        scaled = scaled.at[-1].set(blocks[-1] / divisor[-1])
    table = TABLES[values]
    order = np.argsort(table, kind="stable").astype(np.uint8)
    ranks = _count_edges_below(jnp.clip(scaled, -1, 1), (table[order[:-1]] + table[order[1:]]) / 2)
    codes = ranks if (order == np.arange(16)).all() else jnp.asarray(order)[ranks]
    packed = pack(codes.reshape(-1)[: flat.size].reshape(shape), ZERO_CODES[values])
    by_row = (shape[0], -1) if is_planar(shape) else (-1,)
    if not double:
        return packed, absmax.reshape(by_row), None, None
    absmax_codes, nested_absmax, offset = quantize_absmax(absmax)
    return packed, absmax_codes.reshape(by_row), nested_absmax, offset


def quantize_absmax(absmax: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """absmax f32 [NB] -> bytes uint8 [NB], nested_absmax f32 [G], offset f32 []: scales of scales."""
    offset = absmax.mean()
    groups = jnp.pad(absmax - offset, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
    nested_absmax = jnp.abs(groups).max(axis=1)
    inverse = lax.optimization_barrier(1.0 / jnp.where(nested_absmax > 0, nested_absmax, 1.0))
    scaled = jnp.clip(groups * inverse[:, None], -1, 1)
    # bitsandbytes looks the entry up on a grid of 65,536 points, so a value is first rounded to that grid.
    grid = jnp.round(lax.optimization_barrier((scaled + 1.0) / 2.0) * 65535.0)
    on_grid = lax.optimization_barrier(2.0 * grid / 65535.0) - 1.0
    codes = jnp.searchsorted(_MAP_EDGES, on_grid.reshape(-1), side="left", method="sort").astype(jnp.uint8)
    return codes[: absmax.size], nested_absmax, offset


def decode_absmax(absmax: jax.Array, nested_absmax: jax.Array, offset: jax.Array) -> jax.Array:
    """The float32 scale of every block, in the shape of `absmax`."""
    groups = jnp.repeat(nested_absmax, GROUP)[: absmax.size].reshape(absmax.shape)
    # The barrier keeps XLA from fusing product and sum into one rounding, which bitsandbytes does not.
    return lax.optimization_barrier(jnp.asarray(DYNAMIC_MAP)[absmax] * groups) + offset


def dequantize(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array | None,
    offset: jax.Array | None,
    *,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    values: str,
) -> jax.Array:
    """The weight [N, K] in `dtype`: value times scale in float32, rounded once."""
    scales = absmax
    if nested_absmax is not None and offset is not None:
        scales = decode_absmax(absmax, nested_absmax, offset)
    weight = (jnp.asarray(TABLES[values])[unpack(codes, shape)] * scales[..., None]).astype(dtype)
    if is_planar(shape):
        return weight.reshape(shape)  # straight to its shape: a detour over one axis would undo any sharding
    return weight.reshape(-1)[: math.prod(shape)].reshape(shape)


def _count_edges_below(x: jax.Array, edges: np.ndarray) -> jax.Array:
    """How many edges lie strictly below x: the code of the nearest value, ties to the lower one."""
    return sum((x > edge).astype(jnp.uint8) for edge in edges)
