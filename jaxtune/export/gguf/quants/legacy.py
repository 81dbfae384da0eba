"""The types of 32 values with one scale, and perhaps a minimum, as float16."""

from typing import Any

import numpy as np

from jaxtune.export.gguf.quants.search import WEIGHTED_STEPS

Array = Any
"""numpy's or JAX's."""

BLOCK = 32


def q8_0(x: Array, importance: Array | None, on: Any) -> Array:
    """Rounds half away from zero, with the scale as it was before its own rounding."""
    x_BN = x.reshape(-1, BLOCK)
    d = on.quotient(abs(x_BN).max(axis=1, keepdims=True), np.float32(127))
    scaled = _divided(on, x_BN, d)
    whole = on.np.trunc(scaled)
    codes = whole + on.np.trunc(
        2 * (scaled - whole)
    )  # both steps are exact, which adding a half would not be
    return on.joined(len(d), on.half(d), codes.astype(np.int8))


def q4_0(x: Array, importance: Array | None, on: Any) -> Array:
    d, codes = _symmetric(on, x, importance, 8)
    return on.joined(len(d), d, _nibbles(on, codes))


def q5_0(x: Array, importance: Array | None, on: Any) -> Array:
    d, codes = _symmetric(on, x, importance, 16)
    return on.joined(len(d), d, _fifth_bits(on, codes), _nibbles(on, codes & 15))


def q4_1(x: Array, importance: Array | None, on: Any) -> Array:
    d, m, codes = _affine(on, x, importance, 15)
    return on.joined(len(d), d, m, _nibbles(on, codes))


def q5_1(x: Array, importance: Array | None, on: Any) -> Array:
    d, m, codes = _affine(on, x, importance, 31)
    return on.joined(len(d), d, m, _fifth_bits(on, codes), _nibbles(on, codes & 15))


def _symmetric(on: Any, x: Array, importance: Array | None, top: int) -> tuple[Array, Array]:
    if importance is not None:
        d, codes_NB = on.symmetric(on.sub_blocks(x, BLOCK), _weights(on, x, importance), top)
        return on.half(d), (codes_NB.T + np.float32(top)).astype(np.uint8)
    x_BN = x.reshape(-1, BLOCK)
    extreme = on.largest(x_BN.T)[:, None]
    extreme = on.np.where(extreme == 0, np.float32(0), extreme)  # without its sign
    d = on.quotient(extreme, np.float32(-top))
    codes = on.np.trunc(_divided(on, x_BN, d, top + 0.5))
    return on.half(d), on.np.minimum(codes, np.float32(2 * top - 1)).astype(np.uint8)


def _affine(on: Any, x: Array, importance: Array | None, top: int) -> tuple[Array, Array, Array]:
    if importance is not None:
        found = on.affine(on.sub_blocks(x, BLOCK), _weights(on, x, importance), top, WEIGHTED_STEPS)
        return on.half(found.scale_B), on.half(-found.minimum_B), found.codes_NB.T.astype(np.uint8)
    x_BN = x.reshape(-1, BLOCK)
    low = on.smallest(x_BN.T)[:, None]
    range_ = abs(x_BN.max(axis=1, keepdims=True) - low)  # of zeros without a sign
    d = on.quotient(range_, np.float32(top))
    codes = on.np.trunc(_divided(on, x_BN - low, d, 0.5))
    return on.half(d), on.half(low), on.np.minimum(codes, np.float32(top)).astype(np.uint8)


def _divided(on: Any, x_BN: Array, d: Array, offset: float = 0.0) -> Array:
    """x * (1 / d) + offset. 0 where 1 / d is infinite: of an infinity, llama.cpp's conversion to integers makes 0."""
    inverse_B = on.inverse(d)
    scaled = on.product(x_BN, inverse_B) + np.float32(offset)
    return on.np.where(on.np.isinf(inverse_B), np.float32(0), scaled)


def _weights(on: Any, x: Array, importance: Array) -> Array:
    return on.importance_weights(x, importance, BLOCK, over=x.shape[1], factor=1)


def _nibbles(on: Any, codes: Array) -> Array:
    """[B, 16]: a byte holds the codes at l and l + 16."""
    return on.packed(codes.reshape(-1, 2, 16), 4, 1)


def _fifth_bits(on: Any, codes: Array) -> Array:
    """[B, 4], element l in bit l."""
    return on.packed(codes.reshape(-1, 4, 8) >> 4, 1, 2)
