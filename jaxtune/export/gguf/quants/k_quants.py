"""The K types: 256 values to a block, in sub-blocks of 16 or 32, whose scales are codes too, of a float16.

S counts blocks, J the sub-blocks of one, N the values of a sub-block, B = S * J. Once the scales are rounded to what
the file holds, the codes of the values are computed again from those.
"""

from typing import Any

import numpy as np

from jaxtune.export.gguf.quants.search import NOTHING, ONE, WEIGHTED_STEPS, Steps

Array = Any
"""numpy's or JAX's."""

BLOCK = 256


def q2_k(x: Array, importance: Array | None, on: Any) -> Array:
    x_NB = on.sub_blocks(x, 16)
    if importance is None:
        found = on.affine(x_NB, abs(x_NB), 3, Steps(-0.5, 0.1, 15), absolute=True)
        d, scales = _of_the_largest(on, found.scale_B, 16, 15)
        d_min, minimums = _of_the_largest(on, found.minimum_B, 16, 15)
    else:
        w_NB = on.importance_weights(x, importance, 16, over=BLOCK, factor=1)
        found = on.affine(x_NB, w_NB, 3, WEIGHTED_STEPS)
        d, scales = _fitted(on, found.scale_B, on.total(w_NB), 16, 15)
        d_min, minimums = _fitted(on, found.minimum_B, on.total(w_NB), 16, 15)
    both = (scales | minimums << 4).astype(np.uint8)
    codes = _affine_codes(on, x_NB, found.codes_NB, d, both & 15, d_min, both >> 4, 3)
    return on.joined(len(d), both, _two_bits(on, codes), d, d_min)


def q3_k(x: Array, importance: Array | None, on: Any) -> Array:
    x_NB = on.sub_blocks(x, 16)
    if importance is None:
        scale_B, codes_NB = on.one_by_one(x_NB, x_NB * x_NB, 4)
        scale_JS = on.sub_blocks(scale_B, 16)
        extreme_S = on.largest(scale_JS)
        empty_S = extreme_S == 0
        inverse_S = on.quotient(np.float32(-32), extreme_S)
        scales_JS = on.np.clip(on.nearest(inverse_S * scale_JS).astype(np.int8), -32, 31)
        scales_JS = on.np.where(empty_S, np.int8(-32), scales_JS)
        d = on.half(on.np.where(empty_S, np.float32(0), on.quotient(ONE, inverse_S)))
    else:
        w_NB = on.importance_weights(x, importance, 16, over=BLOCK, factor=2)
        scale_B, codes_NB = on.symmetric(x_NB, w_NB, 4)
        scale_JS, w_JS = on.sub_blocks(scale_B, 16), on.sub_blocks(on.total(w_NB), 16)
        d_S, scales_JS = on.symmetric(scale_JS, w_JS, 32)
        d = on.half(d_S)
    scales = scales_JS.T
    codes = _symmetric_codes(on, x_NB, codes_NB, d, scales, 4)
    high = on.packed(codes.reshape(-1, 8, 32) >> 2, 1, 1)
    return on.joined(len(d), high, _two_bits(on, codes & 3), _six_bits(on, (scales + 32).astype(np.uint8)), d)


def q4_k(x: Array, importance: Array | None, on: Any) -> Array:
    d, d_min, scales, codes = _affine_32(on, x, importance, 15, Steps(-1.0, 0.1, 20))
    return on.joined(len(d), d, d_min, scales, on.packed(codes.reshape(-1, 4, 2, 32), 4, 2))


def q5_k(x: Array, importance: Array | None, on: Any) -> Array:
    d, d_min, scales, codes = _affine_32(on, x, importance, 31, Steps(-0.5, 0.1, 15))
    high = on.packed(codes.reshape(-1, 8, 32) >> 4, 1, 1)
    low = on.packed((codes & 15).reshape(-1, 4, 2, 32), 4, 2)
    return on.joined(len(d), d, d_min, scales, high, low)


def q6_k(x: Array, importance: Array | None, on: Any) -> Array:
    x_NB = on.sub_blocks(x, 16)
    w_NB = x_NB * x_NB if importance is None else on.sub_blocks(on.np.broadcast_to(importance, x.shape), 16)
    scale_B, codes_NB = on.symmetric(x_NB, w_NB, 32)
    scale_SJ = scale_B.reshape(-1, 16)
    extreme_S = on.largest(scale_SJ.T)
    empty_S = abs(extreme_S) < NOTHING
    inverse_S = on.quotient(np.float32(-128), extreme_S)
    scales = on.np.minimum(127, on.nearest(inverse_S[:, None] * scale_SJ)).astype(np.int8)
    d = on.half(on.np.where(empty_S, np.float32(0), on.quotient(ONE, inverse_S)))
    codes = _symmetric_codes(on, x_NB, codes_NB, d, scales, 32)
    low = on.packed((codes & 15).reshape(-1, 2, 2, 2, 32), 4, 2)
    blocks = on.joined(len(d), low, on.packed(codes.reshape(-1, 2, 4, 32) >> 4, 2, 2), scales, d)
    return on.np.where(empty_S[:, None], np.uint8(0), blocks)


def _in_order(on: Any, codes_NB: Array) -> Array:
    """[S, 256]"""
    return on.settled(codes_NB.astype(np.uint8).T.reshape(-1, BLOCK))


def _of_the_largest(on: Any, scale_B: Array, per_block: int, top: int) -> tuple[Array, Array]:
    """Scales as multiples [S, J] of a float16 [S], such that the largest is `top` times it."""
    scale_SJ = scale_B.reshape(-1, per_block)
    largest_S = on.np.maximum(scale_SJ.max(axis=1), np.float32(0))
    inverse_S = on.ratio(on.np.full_like(largest_S, top), largest_S)
    return on.half(on.quotient(largest_S, np.float32(top))), on.nearest(inverse_S[:, None] * scale_SJ)


def _fitted(on: Any, scale_B: Array, w_B: Array, per_block: int, top: int) -> tuple[Array, Array]:
    """The same by a search, weighted with what the values weigh together."""
    scale_JS, w_JS = on.sub_blocks(scale_B, per_block), on.sub_blocks(w_B, per_block)
    d_S, codes_JS = on.positive(scale_JS, w_JS, top)
    return on.half(d_S), codes_JS.T.astype(np.int32)


def _affine_32(on: Any, x: Array, importance: Array | None, top: int, steps: Steps) -> tuple[Array, ...]:
    x_NB = on.sub_blocks(x, 32)
    if importance is None:
        mean_B = on.root(on.total(x_NB * x_NB) / np.float32(32))
        found = on.affine(x_NB, mean_B + abs(x_NB), top, steps)
        d, scales = _of_the_largest(on, found.scale_B, 8, 63)
        d_min, minimums = _of_the_largest(on, found.minimum_B, 8, 63)
    else:
        w_NB = on.importance_weights(x, importance, 32, over=BLOCK, factor=2)
        found = on.affine(x_NB, w_NB, top, WEIGHTED_STEPS)
        d, scales = _fitted(on, found.scale_B, on.total(w_NB), 8, 63)
        d_min, minimums = _fitted(on, found.minimum_B, on.total(w_NB), 8, 63)
    scales, minimums = scales.astype(np.uint8), minimums.astype(np.uint8)
    if importance is None or top == 31:
        # In the other case llama.cpp forgets it, and what a degenerate fit wraps to spills into its neighbours.
        scales, minimums = on.np.minimum(scales, np.uint8(63)), on.np.minimum(minimums, np.uint8(63))
    stored = _pairs_of_six_bits(on, scales, minimums)
    scales, minimums = of_pairs_of_six_bits(on, stored)
    return d, d_min, stored, _affine_codes(on, x_NB, found.codes_NB, d, scales, d_min, minimums, top)


def _affine_codes(
    on: Any,
    x_NB: Array,
    codes_NB: Array,
    d: Array,
    scales_SJ: Array,
    d_min: Array,
    minimums_SJ: Array,
    top: int,
) -> Array:
    """The values in units of the scales as they are stored; where that is 0, `codes_NB`. uint8 [S, 256]"""
    scale_B, minimum_B = _multiples(on, d, scales_SJ), _multiples(on, d_min, minimums_SJ)
    again_NB = on.np.clip(on.nearest(on.quotient(x_NB + minimum_B, scale_B)), 0, top)
    return _in_order(on, on.np.where(scale_B == 0, codes_NB, again_NB.astype(np.float32)))


def _symmetric_codes(on: Any, x_NB: Array, codes_NB: Array, d: Array, scales_SJ: Array, top: int) -> Array:
    scale_B = _multiples(on, d, scales_SJ)
    again_NB = on.np.clip(on.nearest(on.quotient(x_NB, scale_B)), -top, top - 1)
    return _in_order(on, on.np.where(scale_B == 0, codes_NB, again_NB.astype(np.float32)) + np.float32(top))


def _multiples(on: Any, d: Array, scales_SJ: Array) -> Array:
    return on.product(d.astype(np.float32)[:, None], scales_SJ.astype(np.float32)).reshape(-1)


def _two_bits(on: Any, codes: Array) -> Array:
    """Of each 128, a byte holds those at l, l + 32, l + 64 and l + 96."""
    return on.packed(codes.reshape(-1, 2, 4, 32), 2, 2)


def _six_bits(on: Any, scales: Array) -> Array:
    """16 scales in 12 bytes: j beside j + 8 in four bits each, then what is above them, j, j + 4, j + 8 and j + 12."""
    low, high = (
        on.packed((scales & 15).reshape(-1, 2, 8), 4, 1),
        on.packed((scales >> 4).reshape(-1, 4, 4), 2, 1),
    )
    return on.np.concatenate([low, high], axis=1)


def _pairs_of_six_bits(on: Any, scales: Array, minimums: Array) -> Array:
    """8 scales and 8 minimums in 12 bytes: four scales, four minimums, then the low halves of the other four of each
    in one byte; what is above these is on top of the first eight bytes."""
    first_scales = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    first_minimums = minimums[:, :4] | (minimums[:, 4:] >> 4) << 6
    return on.np.concatenate(
        [first_scales, first_minimums, scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4], axis=1
    )


def of_pairs_of_six_bits(on: Any, stored: Array) -> tuple[Array, Array]:
    first, above, others = stored[:, :8] & 63, stored[:, :8] >> 6 << 4, stored[:, 8:]
    scales = on.np.concatenate([first[:, :4], others & 15 | above[:, :4]], axis=1)
    return scales, on.np.concatenate([first[:, 4:], others >> 4 | above[:, 4:]], axis=1)
