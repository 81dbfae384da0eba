"""How the scale of a sub-block is found: llama.cpp's searches, step by step, so that the bytes are its bytes.

Arrays are x_NB: the N values of a sub-block along the first axis, as many sub-blocks as wished along the second. Sums
over the first axis then add in the order of the elements, as llama.cpp does; any other order rounds otherwise and now
and then another candidate wins. All arithmetic is float32 and none of it is fused. A search remembers the grid that
won, not its codes: they are computed again at the end, which is cheaper than copying them at every improvement.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxtune.export.gguf.quants.pack import half, joined, packed

__all__ = [
    "affine", "half", "importance_weights", "inverse", "joined", "largest", "nearest", "np", "one_by_one", "packed",
    "positive", "product", "quotient", "ratio", "root", "settled", "smallest", "sub_blocks", "symmetric", "total",
]  # fmt: skip

product, quotient, root = np.multiply, np.divide, np.sqrt
"""Rounded by themselves, which goes without saying here."""

ONE = np.float32(1)
NOTHING = np.float32(1e-15)
"""A sub-block whose largest value is below this is taken for zeros."""
_MAGIC = np.float32(12582912)
"""1.5 * 2**23: what is added to it loses its fraction, half to even."""
_ROUNDABLE = np.float32(1 << 22)
"""What is larger does not survive that addition, and wraps around."""


def settled(x: np.ndarray) -> np.ndarray:
    """As it is: what matters to a compiler only."""
    return x


def nearest(x: np.ndarray) -> np.ndarray:
    """The integers next to x, half to even, as int32; beyond +-2**22, infinite or NaN, what llama.cpp's trick gives."""
    return ((x + _MAGIC).view(np.int32) & 0x7FFFFF) - 0x400000


def total(x_NB: np.ndarray) -> np.ndarray:
    """The sum over a sub-block, in the order of its elements. [B]"""
    if x_NB.shape[1] == 1:  # numpy would add a single column in pairs
        return total(np.repeat(x_NB, 2, axis=1))[:1]
    return np.add.reduce(x_NB, axis=0)


def largest(x_NB: np.ndarray) -> np.ndarray:
    """Of each sub-block the value that is farthest from zero, with its sign; the first of several. [B]"""
    return np.take_along_axis(x_NB, np.abs(x_NB).argmax(axis=0)[None], axis=0)[0]


def smallest(x_NB: np.ndarray) -> np.ndarray:
    """Of each sub-block; of zeros the first, whose sign shows where it is stored. [B]"""
    return np.take_along_axis(x_NB, (x_NB == x_NB.min(axis=0)).argmax(axis=0)[None], axis=0)[0]


def inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, or 0 where x is 0."""
    return np.divide(ONE, x, out=np.zeros_like(x), where=x != 0)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, or 0 where b is not positive."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def sub_blocks(x: np.ndarray, n: int) -> np.ndarray:
    """[rows, columns] -> x_NB"""
    return np.ascontiguousarray(x.reshape(-1, n).T)


def importance_weights(
    x: np.ndarray, importance: np.ndarray, n: int, *, over: int, factor: int
) -> np.ndarray:
    """w_NB: the importance of a column, more for a value that is large next to the others of its `over`."""
    squares = total(sub_blocks(x * x, over)) * np.float32(factor) / np.float32(over)
    return sub_blocks(importance * np.sqrt(np.repeat(squares, over).reshape(x.shape) + x * x), n)


class Steps(NamedTuple):
    """The grids that are tried: with N codes above 0, the range of a sub-block is divided by N + first + step * t for
    t = 0, 1, ..., last."""

    first: float
    step: float
    last: int

    def divisors(self, top: int) -> Iterator[np.float32]:
        for t in range(self.last + 1):
            yield np.float32(self.first) + np.float32(self.step) * np.float32(t) + np.float32(top)


WEIGHTED_STEPS = Steps(-0.9, 0.05, 36)
"""Of all types, when columns have an importance."""


class Affine(NamedTuple):
    scale_B: Any
    minimum_B: Any
    """x = scale * code - minimum; at least 0."""
    codes_NB: Any


def affine(x_NB: np.ndarray, w_NB: np.ndarray, top: int, steps: Steps, *, absolute: bool = False) -> Affine:
    """Codes 0..top, with the scale and the minimum that fit them best by least squares weighted with w, for each grid
    of `steps`; the best of these by the weighted sum of squared, or of absolute errors.

    A grid begins at the minimum of the best so far, not at the smallest value: an improvement moves all later grids."""
    lowest_B = smallest(x_NB)
    lowest_B = np.where(lowest_B > 0, np.float32(0), lowest_B)
    high_B = x_NB.max(axis=0)
    codes_NB, terms_NB, products_NB = (np.empty_like(x_NB) for _ in range(3))

    def encode(inverse_B: np.ndarray, low_B: np.ndarray) -> None:
        np.subtract(x_NB, low_B, out=codes_NB)
        np.multiply(codes_NB, inverse_B, out=codes_NB)
        reach_B = np.abs(inverse_B) * np.maximum(high_B - low_B, low_B - lowest_B)
        wild_B = ~(reach_B <= _ROUNDABLE)
        if wild_B.any():
            codes_NB[:, wild_B] = nearest(codes_NB[:, wild_B])
        np.rint(codes_NB, out=codes_NB)
        np.clip(codes_NB, 0, top, out=codes_NB)

    def error(scale_B: np.ndarray, low_B: np.ndarray) -> np.ndarray:
        np.multiply(codes_NB, scale_B, out=terms_NB)
        np.add(terms_NB, low_B, out=terms_NB)
        np.subtract(terms_NB, x_NB, out=terms_NB)
        if absolute:
            np.abs(terms_NB, out=terms_NB)
        else:
            np.multiply(terms_NB, terms_NB, out=terms_NB)
        return total(np.multiply(terms_NB, w_NB, out=terms_NB))

    sum_w_B, sum_wx_B = total(w_NB), total(w_NB * x_NB)
    low_B = lowest_B.copy()
    best_low_B, best_inverse_B = low_B.copy(), np.float32(top) / (high_B - low_B)
    encode(best_inverse_B, low_B)
    scale_B = ONE / best_inverse_B
    best_B = error(scale_B, low_B)
    for divisor in steps.divisors(top):
        inverse_B = divisor / (high_B - low_B)
        encode(inverse_B, low_B)
        np.multiply(w_NB, codes_NB, out=terms_NB)
        sum_wc_B = total(terms_NB)
        sum_wcx_B = total(np.multiply(terms_NB, x_NB, out=products_NB))
        sum_wcc_B = total(np.multiply(terms_NB, codes_NB, out=terms_NB))
        determinant_B = sum_w_B * sum_wcc_B - sum_wc_B * sum_wc_B
        fit_B = (sum_w_B * sum_wcx_B - sum_wx_B * sum_wc_B) / determinant_B
        fit_low_B = (sum_wcc_B * sum_wx_B - sum_wc_B * sum_wcx_B) / determinant_B
        above_B = fit_low_B > 0
        np.putmask(fit_B, above_B, sum_wcx_B / sum_wcc_B)
        np.putmask(fit_low_B, above_B, np.float32(0))
        error_B = error(fit_B, fit_low_B)
        better_B = (determinant_B > 0) & (error_B < best_B)
        np.putmask(best_B, better_B, error_B)
        np.putmask(scale_B, better_B, fit_B)
        np.putmask(best_inverse_B, better_B, inverse_B)
        np.putmask(best_low_B, better_B, low_B)
        np.putmask(low_B, better_B, fit_low_B)
    encode(best_inverse_B, best_low_B)
    flat_B = high_B == lowest_B
    return Affine(
        np.where(flat_B, np.float32(0), scale_B),
        -np.where(flat_B, lowest_B, low_B),
        np.where(flat_B, np.float32(0), codes_NB),
    )


def symmetric(x_NB: np.ndarray, w_NB: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """x = scale_B * code_NB with codes -top..top-1, the scale by least squares weighted with w; of 19 grids, around the
    one in which the largest value has the code -top, the one that leaves the least error.

    A sub-block of zeros has scale 0 and codes -top: that is 0 as it is stored."""
    extreme_B = largest(x_NB)
    zeros_B = np.abs(extreme_B) < NOTHING
    extreme_B = np.where(zeros_B, ONE, extreme_B)
    wx_NB = w_NB * x_NB
    codes_NB, terms_NB = np.empty_like(x_NB), np.empty_like(x_NB)

    def encode(inverse_B: np.ndarray) -> None:
        np.multiply(x_NB, inverse_B, out=codes_NB)
        np.rint(codes_NB, out=codes_NB)
        np.clip(codes_NB, -top, top - 1, out=codes_NB)

    def sums() -> tuple[np.ndarray, np.ndarray]:
        sum_wxc_B = total(np.multiply(wx_NB, codes_NB, out=terms_NB))
        np.multiply(w_NB, codes_NB, out=terms_NB)
        return sum_wxc_B, total(np.multiply(terms_NB, codes_NB, out=terms_NB))

    best_inverse_B = np.float32(-top) / extreme_B
    encode(best_inverse_B)
    sum_wxc_B, sum_wcc_B = sums()
    scale_B = ratio(sum_wxc_B, sum_wcc_B)
    best_B = scale_B * sum_wxc_B
    for t in (t for t in range(-9, 10) if t):
        inverse_B = -(np.float32(top) + np.float32(0.1) * np.float32(t)) / extreme_B
        encode(inverse_B)
        sum_wxc_B, sum_wcc_B = sums()
        better_B = (sum_wcc_B > 0) & (sum_wxc_B * sum_wxc_B > best_B * sum_wcc_B)
        np.putmask(scale_B, better_B, sum_wxc_B / sum_wcc_B)
        np.putmask(best_B, better_B, scale_B * sum_wxc_B)
        np.putmask(best_inverse_B, better_B, inverse_B)
    encode(best_inverse_B)
    return np.where(zeros_B, np.float32(0), scale_B), np.where(zeros_B, np.float32(-top), codes_NB)


def one_by_one(x_NB: np.ndarray, w_NB: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """As `symmetric`, by another way: from the grid in which the largest value has the code -top, each code in turn
    moves to where the other codes' scale would put it, if that leaves less error; five times over, or until none
    moves."""
    extreme_B = largest(x_NB)
    zeros_B = np.abs(extreme_B) < NOTHING
    inverse_B = np.float32(-top) / np.where(zeros_B, ONE, extreme_B)
    codes_NB = np.clip(nearest(x_NB * inverse_B), -top, top - 1).astype(np.float32)
    wx_NB = w_NB * x_NB
    sum_wxc_B, sum_wcc_B = total(wx_NB * codes_NB), total(w_NB * codes_NB * codes_NB)
    moving: slice | np.ndarray = slice(None)
    for _ in range(5):
        codes_NM = codes_NB[:, moving]
        p, q = sum_wxc_B[moving], sum_wcc_B[moving]
        moved = np.zeros(p.shape, bool)
        for n, code in enumerate(codes_NM):
            x, w, wx = x_NB[n, moving], w_NB[n, moving], wx_NB[n, moving]
            p_rest, q_rest = p - wx * code, q - w * code * code
            new = np.clip(nearest(x * q_rest / p_rest), -top, top - 1).astype(np.float32)
            p_new, q_new = p_rest + wx * new, q_rest + w * new * new
            better = (p_rest > 0) & (new != code) & (q_new > 0) & (p_new * p_new * q > p * p * q_new)
            np.putmask(code, better, new)
            np.putmask(p, better, p_new)
            np.putmask(q, better, q_new)
            moved |= better
        codes_NB[:, moving], sum_wxc_B[moving], sum_wcc_B[moving] = codes_NM, p, q
        moving = np.arange(x_NB.shape[1])[moving][moved]
        if not len(moving):
            break
    scale_B = ratio(sum_wxc_B, sum_wcc_B)
    return np.where(zeros_B, np.float32(0), scale_B), np.where(zeros_B, np.float32(-top), codes_NB)


def positive(x_NB: np.ndarray, w_NB: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """x = scale_B * code_NB with codes 0..top, for scales that are scaled themselves: the best of nine grids by the
    weighted sum of squared errors, whose codes then move one by one."""
    largest_B = np.maximum(x_NB.max(axis=0), np.float32(0))
    zeros_B = largest_B < NOTHING

    def encoded(inverse_B: np.ndarray) -> np.ndarray:
        return np.minimum(top, nearest(inverse_B * x_NB)).astype(np.float32)

    def error(inverse_B: np.ndarray, codes_NB: np.ndarray) -> np.ndarray:
        off_NB = x_NB - (ONE / inverse_B) * codes_NB
        return total(w_NB * off_NB * off_NB)

    best_inverse_B = np.float32(top) / largest_B
    best_B = error(best_inverse_B, _as_byte(nearest(best_inverse_B * x_NB)))
    for t in (t for t in range(-4, 5) if t):
        inverse_B = (np.float32(0.1) * np.float32(t) + np.float32(top)) / largest_B
        error_B = error(inverse_B, encoded(inverse_B))
        better_B = error_B < best_B
        best_B = np.where(better_B, error_B, best_B)
        best_inverse_B = np.where(better_B, inverse_B, best_inverse_B)
    wx_NB, codes_NB = w_NB * x_NB, encoded(best_inverse_B)
    p, q = total(wx_NB * codes_NB), total(w_NB * codes_NB * codes_NB)
    codes_NB = _as_byte(codes_NB)
    for _ in range(5):
        moved = False
        for x, w, wx, code in zip(x_NB, w_NB, wx_NB, codes_NB, strict=True):
            p_rest, q_rest = p - wx * code, q - w * code * code
            new = np.minimum(top, nearest(x * q_rest / p_rest)).astype(np.float32)
            p_new, q_new = p_rest + wx * new, q_rest + w * new * new
            better = (p_rest > 0) & (q_rest > 0) & (new != code) & (p_new * p_new * q > p * p * q_new)
            np.putmask(code, better, _as_byte(new))
            np.putmask(p, better, p_new)
            np.putmask(q, better, q_new)
            moved |= bool(better.any())
        if not moved:
            break
    return np.where(zeros_B, np.float32(0), ratio(p, q)), np.where(zeros_B, np.float32(0), codes_NB)


def _as_byte(codes: np.ndarray) -> np.ndarray:
    """A negative code, which only a degenerate fit asks for, wraps around in llama.cpp's unsigned bytes."""
    return (codes.astype(np.int32) & 255).astype(np.float32)
