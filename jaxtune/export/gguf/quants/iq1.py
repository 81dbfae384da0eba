"""IQ1_S and IQ1_M: 8 numbers are an entry of a book of -1, 0 and 1, all of them moved up or down by an eighth.

All ways to split the sorted values of a sub-block into three are tried; groups that the book has not then become
neighbours of theirs. In IQ1_S the 32 values of a sub-block move together, in IQ1_M the two halves of 16 move apart.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxtune.export.gguf.quants.books import book, groups, ungrouped
from jaxtune.export.gguf.quants.pack import half, joined, packed
from jaxtune.export.gguf.quants.search import ONE, importance_weights, nearest, sub_blocks, total

_HALF = np.float32(0.5)
_SHIFT = np.float32(0.125)


def iq1_s(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    x_NB = sub_blocks(x, 32)
    w_NB = importance_weights(x, importance, 32, over=256, factor=2)
    order_NB, (x_sums, w_sums) = _sorted_sums(x_NB, w_NB * x_NB, w_NB)
    down, up = -ONE + _SHIFT, ONE + _SHIFT  # moved up; moved down it is -up and -down
    ends_x, ends_w = x_sums[-1] - x_sums, w_sums[-1] - w_sums
    best = _Best(x_NB.shape[1])
    for low, high in _splits(32):
        middle_x = (x_sums[high] - x_sums[low]) * _SHIFT
        middle_w = (w_sums[high] - w_sums[low]) * _SHIFT * _SHIFT
        p = x_sums[low] * down + middle_x + ends_x[high] * up
        q = w_sums[low] * down * down + middle_w + ends_w[high] * up * up
        best.propose(p, q, low, high, 0)
        p = x_sums[low] * -up - middle_x + ends_x[high] * -down
        q = w_sums[low] * up * up + middle_w + ends_w[high] * down * down
        best.propose(p, q, low, high, 1)
    moved_down_B = (best.variant_B == 1) ^ (best.scale_B < 0)
    shift_B = np.where(moved_down_B, -_SHIFT, _SHIFT)
    found = _entries(x_NB, w_NB, order_NB, best, np.tile(shift_B, (4, 1)), np.float32(1e-12))
    scale_SJ = found.scale_B.reshape(-1, 8)
    d_S, scales = _eighths(scale_SJ)
    scales = scales | (moved_down_B & ~found.empty_B).reshape(-1, 8).astype(np.uint16) << 3
    entry_BK = found.entry_KB.T.astype(np.uint16)
    high = np.bitwise_or.reduce((entry_BK >> 8) << 3 * np.arange(4, dtype=np.uint16), axis=1).reshape(-1, 8)
    high = np.where(d_S[:, None] == 0, high, high | scales << 12)
    return joined(len(d_S), half(d_S * np.float32(1.125)), entry_BK.astype(np.uint8), high)


def iq1_m(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    x_NB = sub_blocks(x, 16)
    w_NB = importance_weights(x, importance, 16, over=256, factor=2)
    first = np.arange(16)[:, None] < 8
    halves = [np.where(of, a, 0) for of in (first, ~first) for a in (w_NB * x_NB, w_NB)]
    order_NB, sums = _sorted_sums(x_NB, *halves)
    best = _Best(x_NB.shape[1])
    up = (ONE + _SHIFT, np.float32(0.75), np.float32(-1.25))  # the largest, and differences of squares
    down = (ONE - _SHIFT, np.float32(1.25), np.float32(-0.75))
    for low, high in _splits(16):
        fits = []
        for x_sums, w_sums in (sums[:2], sums[2:]):
            x_both = x_sums[low] + x_sums[high]
            for top, a, b in (up, down):
                q = w_sums[-1] * top * top + w_sums[low] * a + w_sums[high] * b
                fits.append((x_sums[-1] * top - x_both, q))
        for variant in range(4):
            (p_first, q_first), (p_second, q_second) = fits[variant >> 1], fits[2 + (variant & 1)]
            best.propose(p_first + p_second, q_first + q_second, low, high, variant)
    variant_B = np.where(best.scale_B < 0, 3 - best.variant_B, best.variant_B)
    moved_down_KB = np.stack([variant_B >> 1, variant_B & 1])
    found = _entries(x_NB, w_NB, order_NB, best, np.where(moved_down_KB, -_SHIFT, _SHIFT), np.float32(1e-7))
    d_S, scales = _eighths(found.scale_B.reshape(-1, 16))
    moved_down_KB = np.where(found.empty_B, 0, moved_down_KB)
    shift_KB = np.where(moved_down_KB, -_SHIFT, _SHIFT)
    q_NB = found.values(shift_KB) * (2 * scales + 1).reshape(-1).astype(np.float32)
    by_block = lambda a_NB: np.ascontiguousarray(a_NB.T.reshape(-1, 256).T)
    p_S, q_S = total(by_block(w_NB * q_NB * x_NB)), total(by_block(w_NB * q_NB * q_NB))
    refined_S = np.where(q_S > 0, p_S / q_S, d_S)
    d_bits = half(np.where(d_S == 0, 0, refined_S * np.float32(1.1125))).view(np.uint16)
    entry_BK = found.entry_KB.T.astype(np.uint16)
    high_BK = (entry_BK >> 8).astype(np.uint8)
    high_BK = np.where(
        np.repeat(d_S == 0, 16)[:, None], high_BK, high_BK | (moved_down_KB.T << 3).astype(np.uint8)
    )
    shifts = 3 * np.arange(4, dtype=np.uint16)
    scales = np.bitwise_or.reduce(np.where(d_S[:, None] == 0, 0, scales).reshape(-1, 4, 4) << shifts, axis=2)
    scales |= (d_bits[:, None] >> 4 * np.arange(4, dtype=np.uint16)) << 12
    return joined(len(d_S), entry_BK.astype(np.uint8), packed(high_BK, 4, 1), scales)


def _splits(n: int) -> Iterator[tuple[int, int]]:
    return ((low, high) for low in range(n + 1) for high in range(low, n + 1))


def _sorted_sums(x_NB: np.ndarray, *terms: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ascending order of the values, and for each of `terms` its sums over none, one, two, ... of them."""
    order_NB = np.argsort(x_NB, axis=0, kind="stable")
    nothing = np.zeros((1, x_NB.shape[1]), np.float32)
    in_order = (np.take_along_axis(term, order_NB, axis=0) for term in terms)
    return order_NB, [np.add.accumulate(np.concatenate([nothing, term]), axis=0) for term in in_order]


class _Best:
    """The best split that was proposed: below `low_B` of the sorted values are -1, from `high_B` on 1."""

    def __init__(self, B: int):
        self.scale_B = np.zeros(B, np.float32)
        self._score_B = np.full(B, np.finfo(np.float32).min)
        self._choice_B = np.full(B, -1, np.int32)

    def propose(self, p: np.ndarray, q: np.ndarray, low: int, high: int, variant: int) -> None:
        better = (q > 0) & (p * p > self._score_B * q)
        scale = p / q
        np.putmask(self.scale_B, better, scale)
        np.putmask(self._score_B, better, scale * p)
        np.putmask(self._choice_B, better, np.int32(low << 16 | high << 8 | variant))

    @property
    def none_B(self) -> np.ndarray:
        return self._choice_B < 0

    @property
    def low_B(self) -> np.ndarray:
        return self._choice_B >> 16

    @property
    def high_B(self) -> np.ndarray:
        return self._choice_B >> 8 & 255

    @property
    def variant_B(self) -> np.ndarray:
        return self._choice_B & 255


class _Found(NamedTuple):
    scale_B: np.ndarray
    entry_KB: np.ndarray
    empty_B: np.ndarray

    def values(self, shift_KB: np.ndarray) -> np.ndarray:
        """[N, B]"""
        levels_GC = book("IQ1_S").levels_GP[:, self.entry_KB.reshape(-1)]
        return ungrouped(levels_GC - ONE + shift_KB.reshape(-1), self.entry_KB.shape[1])


def _entries(
    x_NB: np.ndarray,
    w_NB: np.ndarray,
    order_NB: np.ndarray,
    best: _Best,
    shift_KB: np.ndarray,
    smallest: np.float32,
) -> _Found:
    """A negative scale turns the split around; `shift_KB` has turned already."""
    B = x_NB.shape[1]
    rank_NB = np.empty_like(order_NB)
    np.put_along_axis(rank_NB, order_NB, np.arange(len(x_NB))[:, None], axis=0)
    levels_NB = (rank_NB >= best.low_B).astype(np.int32) + (rank_NB >= best.high_B)
    levels_NB = np.where(best.scale_B < 0, 2 - levels_NB, levels_NB)
    scale_B = np.abs(best.scale_B)
    K, ours = len(shift_KB), book("IQ1_S")
    entry_C, missing_C = ours.entries(
        groups(levels_NB, 8),
        ours.levels_GP - ONE,
        groups(x_NB, 8),
        groups(w_NB, 8),
        np.tile(scale_B, K),
        shift_KB.reshape(-1),
    )
    empty_B = (np.abs(x_NB).max(axis=0) < smallest) | best.none_B
    found = _Found(scale_B, entry_C.reshape(K, B), empty_B)
    q_NB = found.values(shift_KB)
    p, q = total(w_NB * q_NB * x_NB), total(w_NB * q_NB * q_NB)
    scale_B = np.where(missing_C.reshape(K, B).any(axis=0) & (p > 0) & (q > 0), p / q, scale_B)
    return _Found(np.where(empty_B, 0, scale_B), np.where(empty_B, 0, found.entry_KB), empty_B)


def _eighths(scale_SJ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d [S], and codes 0..7 of the scales d * (2 * code + 1), uint16 [S, J]."""
    d_S = scale_SJ.max(axis=1) / np.float32(15)
    codes = np.clip(nearest(_HALF * ((ONE / d_S)[:, None] * scale_SJ - ONE)), 0, 7)
    return d_S, codes.astype(np.uint16)
