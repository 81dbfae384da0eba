"""IQ2 and IQ3: the magnitudes of 8 or 4 numbers are an entry of a book of odd numbers, their signs stand beside it.

K counts the groups of a sub-block, G the numbers of a group, C = K * B all groups.
"""

from typing import NamedTuple

import numpy as np

from jaxtune.export.gguf.quants.books import Book, book, groups, ungrouped
from jaxtune.export.gguf.quants.pack import half, joined, packed
from jaxtune.export.gguf.quants.search import (
    NOTHING,
    ONE,
    importance_weights,
    nearest,
    positive,
    sub_blocks,
    total,
)

_HALF = np.float32(0.5)


class _Magnitudes(NamedTuple):
    """Values apart from their signs."""

    x_NB: np.ndarray
    signs_8B: np.ndarray
    """[N / 8, B] uint8, bit l of element l."""


def _magnitudes(x_NB: np.ndarray, w_NB: np.ndarray, *, even: bool) -> _Magnitudes:
    """If `even`, the eighth sign of a group follows from the others: of an odd number of negatives, the one value that
    weighs least gets the wrong sign."""
    x_K8B, w_K8B = x_NB.reshape(-1, 8, x_NB.shape[1]), w_NB.reshape(-1, 8, x_NB.shape[1])
    negative = ~(x_K8B >= 0)
    magnitudes = np.where(negative, -x_K8B, x_K8B)
    if even:
        odd = negative.sum(axis=1) % 2 == 1
        least = (w_K8B * x_K8B * x_K8B).argmin(axis=1)
        flipped = odd[:, None] & (np.arange(8)[:, None] == least[:, None])
        magnitudes = np.where(flipped, -magnitudes, magnitudes)
        negative = negative ^ flipped
    return _Magnitudes(magnitudes.reshape(x_NB.shape), packed(negative.astype(np.uint8), 1, 1))


class _Found(NamedTuple):
    scale_B: np.ndarray
    entry_KB: np.ndarray
    signs_8B: np.ndarray


def _search(
    values: _Magnitudes,
    w_NB: np.ndarray,
    book: Book,
    tries: list[np.float32],
    reach_B: np.ndarray,
    start_B: np.ndarray,
    empty_B: np.ndarray,
    *,
    refit: str,
) -> _Found:
    """Entries and the scale that fits them best, for each of `tries`: the number of the book that `reach_B` stands for.
    The best is fitted once more with its own scale: `refit` says whether "always", or where the book has not a group,
    and then whether to find only the "missing" anew or "all"."""
    x_NB, signs_8B = values
    B = x_NB.shape[1]
    x_GC, root_GC = groups(x_NB, book.group), groups(np.sqrt(w_NB), book.group)
    wx_NB = w_NB * x_NB
    odd_GP = 2 * book.levels_GP + ONE

    def entries(inverse_B: np.ndarray, scale_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        K = len(x_NB) // book.group
        scaled_GC = np.tile(inverse_B, K) * x_GC
        levels_GC = np.clip(nearest(_HALF * (scaled_GC - ONE)), 0, book.levels - 1)
        entry_C, missing_C = book.entries(levels_GC, odd_GP, x_GC, root_GC, np.tile(scale_B, K))
        return entry_C.reshape(K, B), missing_C.reshape(K, B)

    def fitted(entry_KB: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        q_NB = ungrouped(odd_GP[:, entry_KB.reshape(-1)], B)
        return total(wx_NB * q_NB), total(w_NB * q_NB * q_NB)

    scale_B, best_B = start_B, np.zeros(B, np.float32)
    entry_KB = np.zeros((len(x_NB) // book.group, B), np.int16)
    missing_KB = np.full(entry_KB.shape, refit == "all")
    for number in tries:
        inverse_B = number / reach_B
        new_KB, new_missing_KB = entries(inverse_B, ONE / inverse_B)
        p, q = fitted(new_KB)
        better_B = (q > 0) & (p * p > best_B * q)
        scale_B = np.where(better_B, p / q, scale_B)
        best_B = np.where(better_B, scale_B * p, best_B)
        entry_KB = np.where(better_B, new_KB, entry_KB)
        missing_KB = np.where(better_B, new_missing_KB, missing_KB)
    new_KB, _ = entries(ONE / scale_B, scale_B)
    again_B = (scale_B > 0) & (missing_KB.any(axis=0) | (refit == "always"))
    entry_KB = np.where(again_B & (missing_KB | (refit != "missing")), new_KB, entry_KB)
    p, q = fitted(entry_KB)
    scale_B = np.where(again_B & (q > 0), p / q, scale_B)
    signs_8B = np.where(scale_B < 0, ~signs_8B, signs_8B)
    scale_B = np.where(empty_B, np.float32(0), np.abs(scale_B))
    return _Found(scale_B, np.where(empty_B, np.int16(0), entry_KB), np.where(empty_B, np.uint8(0), signs_8B))


def _sixteenths(scale_B: np.ndarray, per_block: int, more: float) -> tuple[np.ndarray, np.ndarray]:
    """d as float16, `more` times what is exact, and codes 0..15 of the scales d * (2 * code + 1). [S], [S, J]"""
    scale_SJ = scale_B.reshape(-1, per_block)
    d_S = scale_SJ.max(axis=1) / np.float32(31)
    codes = np.clip(nearest(_HALF * ((ONE / d_S)[:, None] * scale_SJ - ONE)), 0, 15)
    return half(d_S * np.float32(more)), np.where(d_S[:, None] == 0, 0, codes).astype(np.uint8)


def _tries(top: int, step: float, count: int) -> list[np.float32]:
    return [np.float32(top) + np.float32(t) * np.float32(step) for t in range(-count, count + 1)]


def iq2_xxs(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    w_NB = importance_weights(x, importance, 32, over=256, factor=1)
    values = _magnitudes(sub_blocks(x, 32), w_NB, even=True)
    start_B, _ = positive(values.x_NB, w_NB, 4)
    reach_B = start_B * np.float32(3)
    found = _search(
        values, w_NB, book("IQ2_XXS"), _tries(5, 0.1, 6), reach_B, start_B, reach_B <= 0, refit="always"
    )
    d, scales = _sixteenths(found.scale_B, 8, 1)
    fields = [found.entry_KB.T.astype(np.uint8), _signs_and_scales(found.signs_8B, scales)]
    return _emptied(found.scale_B, joined(len(d), d, np.concatenate(fields, axis=1)))


def iq2_xs(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    w_NB = importance_weights(x, importance, 16, over=256, factor=1)
    values = _magnitudes(sub_blocks(x, 16), w_NB, even=True)
    found = _search_from_the_largest(values, w_NB, book("IQ2_XS"), _tries(5, 0.1, 9), NOTHING)
    d, scales = _sixteenths(found.scale_B, 16, 1)
    both = found.entry_KB.T.astype(np.uint16) | (found.signs_8B.T & 127).astype(np.uint16) << 9
    return _emptied(found.scale_B, joined(len(d), d, both, packed(scales.reshape(-1, 8, 2), 4, 2)))


def iq2_s(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    w_NB = importance_weights(x, importance, 16, over=256, factor=2)
    values = _magnitudes(sub_blocks(x, 16), w_NB, even=False)
    found = _search_from_the_largest(values, w_NB, book("IQ2_S"), _tries(5, 0.1, 9), np.float32(1e-8))
    d, scales = _sixteenths(found.scale_B, 16, 0.9875)
    entries = _by_block(found.entry_KB, 16)
    high = packed((entries >> 8).astype(np.uint8).reshape(-1, 8, 4), 2, 2)
    signs = _by_block(found.signs_8B, 16)
    return joined(len(d), d, entries.astype(np.uint8), signs, high, packed(scales.reshape(-1, 8, 2), 4, 2))


def iq3_xxs(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    w_NB = importance_weights(x, importance, 32, over=256, factor=2)
    values = _magnitudes(sub_blocks(x, 32), w_NB, even=True)
    found = _search_from_the_largest(values, w_NB, book("IQ3_XXS"), _tries(15, 0.2, 15), np.float32(1e-8))
    d, scales = _sixteenths(found.scale_B, 8, 1.0125)
    entries = _by_block(found.entry_KB, 8).astype(np.uint8)
    return _emptied(found.scale_B, joined(len(d), d, entries, _signs_and_scales(found.signs_8B, scales)))


def iq3_s(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """llama.cpp forgets to step over a sub-block of zeros, and writes what follows in its place; we do not."""
    x_NB = sub_blocks(x, 32)
    w_NB = x_NB * x_NB if importance is None else importance_weights(x, importance, 32, over=256, factor=2)
    values = _magnitudes(x_NB, w_NB, even=False)
    some = np.finfo(np.float32).smallest_subnormal
    found = _search_from_the_largest(values, w_NB, book("IQ3_S"), _tries(15, 0.2, 9), some, refit="all")
    d, scales = _sixteenths(found.scale_B, 8, 1.033)
    entries, signs = (_by_block(a, 8) for a in (found.entry_KB, found.signs_8B))
    high = packed((entries >> 8).astype(np.uint8).reshape(-1, 8, 8), 1, 2)
    return joined(len(d), d, entries.astype(np.uint8), high, signs, packed(scales.reshape(-1, 4, 2), 4, 2))


def _search_from_the_largest(
    values: _Magnitudes,
    w_NB: np.ndarray,
    book: Book,
    tries: list[np.float32],
    smallest: np.float32,
    *,
    refit: str = "missing",
) -> _Found:
    """A sub-block without a value of `smallest` is empty."""
    reach_B = values.x_NB.max(axis=0)
    start_B = reach_B / np.float32(2 * book.levels - 1)
    return _search(values, w_NB, book, tries, reach_B, start_B, reach_B < smallest, refit=refit)


def _signs_and_scales(signs_8B: np.ndarray, scales_SJ: np.ndarray) -> np.ndarray:
    """uint8 [B, 4]: seven signs of each of four groups in 28 bits, and above them the code of the scale."""
    signs_8B = (signs_8B & 127).astype(np.uint32) << 7 * np.arange(4, dtype=np.uint32)[:, None]
    together = np.bitwise_or.reduce(signs_8B, axis=0) | scales_SJ.reshape(-1).astype(np.uint32) << 28
    return together.view(np.uint8).reshape(-1, 4)


def _emptied(scale_B: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """All zeros where no sub-block has a scale."""
    blocks[scale_B.reshape(len(blocks), -1).max(axis=1) == 0] = 0
    return blocks


def _by_block(a_KB: np.ndarray, per_block: int) -> np.ndarray:
    """[S, J * K]"""
    return a_KB.T.reshape(-1, per_block * len(a_KB))
