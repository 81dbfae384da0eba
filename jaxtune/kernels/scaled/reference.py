"""8-bit weights in plain XLA: quantise, dequantise. All arithmetic is float32.

int8 follows bitsandbytes' LLM.int8() weights: codes are round(w * (127 / absmax)), and the stored statistic is absmax.
float8 follows the published e4m3 checkpoints: the stored scale is absmax / 448, and a weight is code * scale.

Shapes: N = out, K = in, R x C = the grid of scales.
"""

import jax
import jax.numpy as jnp
from jax import lax

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
_BY_127 = 7.874015718698502e-3  # what bitsandbytes multiplies absmax by


def quantize(
    w_NK: jax.Array, *, dtype: jnp.dtype, block: tuple[int | None, int | None]
) -> tuple[jax.Array, jax.Array]:
    """w [N, K] -> codes [N, K] in `dtype`, scales f32 [R, C] (for int8: absmax)."""
    w = w_NK.astype(jnp.float32)
    absmax_RC = _block_absmax(w, block)
    largest = _LARGEST[dtype.name]
    divisor = jnp.where(absmax_RC > 0, absmax_RC, 1.0)
    factor = lax.optimization_barrier(largest / divisor)  # a quotient, then a product: two roundings
    scaled = w * _spread(factor, w.shape)
    if dtype == jnp.int8:
        return jnp.round(scaled).astype(jnp.int8), absmax_RC
    return jnp.clip(scaled, -largest, largest).astype(dtype), absmax_RC / largest


def dequantize(codes_NK: jax.Array, scales_RC: jax.Array, *, dtype: jnp.dtype) -> jax.Array:
    """The weight [N, K] in `dtype`: code times scale in float32, rounded once."""
    scaled = codes_NK.astype(jnp.float32) * _spread(scales_RC, codes_NK.shape)
    if codes_NK.dtype == jnp.int8:
        scaled = lax.optimization_barrier(scaled) * jnp.float32(_BY_127)
    return scaled.astype(dtype)


def _block_absmax(w: jax.Array, block: tuple[int | None, int | None]) -> jax.Array:
    rows, columns = (size if part is None else part for size, part in zip(w.shape, block, strict=True))
    padded = jnp.pad(jnp.abs(w), ((0, -w.shape[0] % rows), (0, -w.shape[1] % columns)))
    return padded.reshape(padded.shape[0] // rows, rows, -1, columns).max(axis=(1, 3))


def _spread(scales_RC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Scales [R, C] -> something that multiplies codes of `shape`."""
    for axis, size in enumerate(shape):
        parts = scales_RC.shape[axis]
        if parts > 1:
            # Blocks of a published size end with a short one where it does not divide the axis.
            block = 128 if parts == -(-size // 128) else -(-size // parts)
            scales_RC = lax.slice_in_dim(jnp.repeat(scales_RC, block, axis=axis), 0, size, axis=axis)
    return jnp.broadcast_to(scales_RC, shape)
