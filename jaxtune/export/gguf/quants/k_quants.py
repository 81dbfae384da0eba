"""The K types: 256 values to a block, in sub-blocks of 16 or 32, whose scales are codes too, of a float16.

S counts blocks, J the sub-blocks of one, N the values of a sub-block, B = S * J. Once the scales are rounded to what
the file holds, the codes of the values are computed again from those.
"""

import numpy as np

from jaxtune.export.gguf.quants.pack import half, joined, packed
from jaxtune.export.gguf.quants.search import (
    NOTHING,
    ONE,
    WEIGHTED_STEPS,
    Steps,
    affine,
    importance_weights,
    largest,
    nearest,
    one_by_one,
    positive,
    sub_blocks,
    symmetric,
    total,
)

BLOCK = 256


def q2_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x_NB = sub_blocks(x, 16)
    if importance is None:
        found = affine(x_NB, np.abs(x_NB), 3, Steps(-0.5, 0.1, 15), absolute=True)
        d, scales = _of_the_largest(found.scale_B, 16, 15)
        d_min, minimums = _of_the_largest(found.minimum_B, 16, 15)
    else:
        w_NB = importance_weights(x, importance, 16, over=BLOCK, factor=1)
        found = affine(x_NB, w_NB, 3, WEIGHTED_STEPS)
        d, scales = _fitted(found.scale_B, total(w_NB), 16, 15)
        d_min, minimums = _fitted(found.minimum_B, total(w_NB), 16, 15)
    both = (scales | minimums << 4).astype(np.uint8)
    codes = _affine_codes(x_NB, found.codes_NB, d, both & 15, d_min, both >> 4, 3)
    return joined(len(d), both, _two_bits(codes), d, d_min)


def q3_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x_NB = sub_blocks(x, 16)
    if importance is None:
        scale_B, codes_NB = one_by_one(x_NB, x_NB * x_NB, 4)
        scale_JS = np.ascontiguousarray(scale_B.reshape(-1, 16).T)
        extreme_S = largest(scale_JS)
        empty_S = extreme_S == 0
        inverse_S = np.float32(-32) / extreme_S
        scales_JS = np.clip(nearest(inverse_S * scale_JS).astype(np.int8), -32, 31)
        scales_JS = np.where(empty_S, np.int8(-32), scales_JS)
        d = half(np.where(empty_S, np.float32(0), ONE / inverse_S))
    else:
        w_NB = importance_weights(x, importance, 16, over=BLOCK, factor=2)
        scale_B, codes_NB = symmetric(x_NB, w_NB, 4)
        scale_JS, w_JS = (np.ascontiguousarray(a.reshape(-1, 16).T) for a in (scale_B, total(w_NB)))
        d_S, scales_JS = symmetric(scale_JS, w_JS, 32)
        d = half(d_S)
    scales = scales_JS.T
    codes = _symmetric_codes(x_NB, codes_NB, d, scales, 4)
    high = packed(codes.reshape(-1, 8, 32) >> 2, 1, 1)
    return joined(len(d), high, _two_bits(codes & 3), _six_bits((scales + 32).astype(np.uint8)), d)


def q4_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, d_min, scales, codes = _affine_32(x, importance, 15, Steps(-1.0, 0.1, 20))
    return joined(len(d), d, d_min, scales, packed(codes.reshape(-1, 4, 2, 32), 4, 2))


def q5_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, d_min, scales, codes = _affine_32(x, importance, 31, Steps(-0.5, 0.1, 15))
    high = packed(codes.reshape(-1, 8, 32) >> 4, 1, 1)
    low = packed((codes & 15).reshape(-1, 4, 2, 32), 4, 2)
    return joined(len(d), d, d_min, scales, high, low)


def q6_k(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x_NB = sub_blocks(x, 16)
    w_NB = x_NB * x_NB if importance is None else sub_blocks(np.broadcast_to(importance, x.shape), 16)
    scale_B, codes_NB = symmetric(x_NB, w_NB, 32)
    scale_SJ = scale_B.reshape(-1, 16)
    extreme_S = largest(scale_SJ.T)
    empty_S = np.abs(extreme_S) < NOTHING
    inverse_S = np.float32(-128) / extreme_S
    scales = np.minimum(127, nearest(inverse_S[:, None] * scale_SJ)).astype(np.int8)
    d = half(np.where(empty_S, np.float32(0), ONE / inverse_S))
    codes = _symmetric_codes(x_NB, codes_NB, d, scales, 32)
    low = packed((codes & 15).reshape(-1, 2, 2, 2, 32), 4, 2)
    blocks = joined(len(d), low, packed(codes.reshape(-1, 2, 4, 32) >> 4, 2, 2), scales, d)
    blocks[empty_S] = 0
    return blocks


def _in_order(codes_NB: np.ndarray) -> np.ndarray:
    """[S, 256]"""
    return codes_NB.astype(np.uint8).T.reshape(-1, BLOCK)


def _of_the_largest(scale_B: np.ndarray, per_block: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales as multiples [S, J] of a float16 [S], such that the largest is `top` times it."""
    scale_SJ = scale_B.reshape(-1, per_block)
    largest_S = np.maximum(scale_SJ.max(axis=1), np.float32(0))
    inverse_S = np.divide(np.float32(top), largest_S, out=np.zeros_like(largest_S), where=largest_S > 0)
    return half(largest_S / np.float32(top)), nearest(inverse_S[:, None] * scale_SJ)


def _fitted(scale_B: np.ndarray, w_B: np.ndarray, per_block: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The same by a search, weighted with what the values weigh together."""
    scale_JS, w_JS = (np.ascontiguousarray(a.reshape(-1, per_block).T) for a in (scale_B, w_B))
    d_S, codes_JS = positive(scale_JS, w_JS, top)
    return half(d_S), codes_JS.T.astype(np.int32)


def _affine_32(
    x: np.ndarray, importance: np.ndarray | None, top: int, steps: Steps
) -> tuple[np.ndarray, ...]:
    x_NB = sub_blocks(x, 32)
    if importance is None:
        found = affine(x_NB, np.sqrt(total(x_NB * x_NB) / np.float32(32)) + np.abs(x_NB), top, steps)
        d, scales = _of_the_largest(found.scale_B, 8, 63)
        d_min, minimums = _of_the_largest(found.minimum_B, 8, 63)
    else:
        w_NB = importance_weights(x, importance, 32, over=BLOCK, factor=2)
        found = affine(x_NB, w_NB, top, WEIGHTED_STEPS)
        d, scales = _fitted(found.scale_B, total(w_NB), 8, 63)
        d_min, minimums = _fitted(found.minimum_B, total(w_NB), 8, 63)
    scales, minimums = scales.astype(np.uint8), minimums.astype(np.uint8)
    if importance is None or top == 31:
        # In the other case llama.cpp forgets it, and what a degenerate fit wraps to spills into its neighbours.
        scales, minimums = np.minimum(scales, 63), np.minimum(minimums, 63)
    stored = _pairs_of_six_bits(scales, minimums)
    scales, minimums = of_pairs_of_six_bits(stored)
    return d, d_min, stored, _affine_codes(x_NB, found.codes_NB, d, scales, d_min, minimums, top)


def _affine_codes(
    x_NB: np.ndarray,
    codes_NB: np.ndarray,
    d: np.ndarray,
    scales_SJ: np.ndarray,
    d_min: np.ndarray,
    minimums_SJ: np.ndarray,
    top: int,
) -> np.ndarray:
    """The values in units of the scales as they are stored; where that is 0, `codes_NB`. uint8 [S, 256]"""
    scale_B = (d.astype(np.float32)[:, None] * scales_SJ).reshape(-1)
    minimum_B = (d_min.astype(np.float32)[:, None] * minimums_SJ).reshape(-1)
    again_NB = np.clip(nearest((x_NB + minimum_B) / scale_B), 0, top)
    return _in_order(np.where(scale_B == 0, codes_NB, again_NB))


def _symmetric_codes(
    x_NB: np.ndarray, codes_NB: np.ndarray, d: np.ndarray, scales_SJ: np.ndarray, top: int
) -> np.ndarray:
    scale_B = (d.astype(np.float32)[:, None] * scales_SJ).reshape(-1)
    again_NB = np.clip(nearest(x_NB / scale_B), -top, top - 1)
    return _in_order(np.where(scale_B == 0, codes_NB, again_NB) + top)


def _two_bits(codes: np.ndarray) -> np.ndarray:
    """Of each 128, a byte holds those at l, l + 32, l + 64 and l + 96."""
    return packed(codes.reshape(-1, 2, 4, 32), 2, 2)


def _six_bits(scales: np.ndarray) -> np.ndarray:
    """16 scales in 12 bytes: j beside j + 8 in four bits each, then what is above them, j, j + 4, j + 8 and j + 12."""
    low, high = packed((scales & 15).reshape(-1, 2, 8), 4, 1), packed((scales >> 4).reshape(-1, 4, 4), 2, 1)
    return np.concatenate([low, high], axis=1)


def _pairs_of_six_bits(scales: np.ndarray, minimums: np.ndarray) -> np.ndarray:
    """8 scales and 8 minimums in 12 bytes: four scales, four minimums, then the low halves of the other four of each
    in one byte; what is above these is on top of the first eight bytes."""
    first_scales = scales[:, :4] | (scales[:, 4:] >> 4) << 6
    first_minimums = minimums[:, :4] | (minimums[:, 4:] >> 4) << 6
    return np.concatenate(
        [first_scales, first_minimums, scales[:, 4:] & 15 | (minimums[:, 4:] & 15) << 4], axis=1
    )


def of_pairs_of_six_bits(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, above, others = stored[:, :8] & 63, stored[:, :8] >> 6 << 4, stored[:, 8:]
    scales = np.concatenate([first[:, :4], others & 15 | above[:, :4]], axis=1)
    return scales, np.concatenate([first[:, 4:], others >> 4 | above[:, 4:]], axis=1)
