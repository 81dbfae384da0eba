"""IQ4_NL and IQ4_XS: a code is an index into 16 values that lie closer together near zero.

Of 32 values each, the scale is found by least squares. IQ4_NL stores it as float16; IQ4_XS stores eight of them as
multiples of one float16.
"""

import numpy as np

from jaxtune.export.gguf.quants.pack import half, joined, packed
from jaxtune.export.gguf.quants.search import (
    NOTHING,
    ONE,
    importance_weights,
    inverse,
    largest,
    nearest,
    ratio,
    sub_blocks,
    total,
)

VALUES = np.asarray([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_TWICE = np.arange(2 * VALUES[0], 2 * VALUES[-1] + 1)
"""Where one value is nearer than its neighbour changes at a multiple of a half."""
_CODES = np.searchsorted((VALUES[1:] + VALUES[:-1]) / 2, _TWICE / 2, side="right").astype(np.uint8)


def iq4_nl(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x_NB = sub_blocks(x, 32)
    scale_B = _scales(x_NB, _weights(x, x_NB, importance, 32))
    codes_NB = _CODES[_places(x_NB * inverse(scale_B))]
    return joined(len(scale_B), half(scale_B), _nibbles(codes_NB))


def iq4_xs(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    x_NB = sub_blocks(x, 32)
    scale_SJ = _scales(x_NB, _weights(x, x_NB, importance, 256)).reshape(-1, 8)
    d_S = -largest(scale_SJ.T) / np.float32(32)
    scales = np.clip(nearest(inverse(d_S)[:, None] * scale_SJ), -32, 31)
    codes_NB = _CODES[_places(x_NB * inverse((d_S[:, None] * scales.astype(np.float32)).reshape(-1)))]
    stored = (scales + 32).astype(np.uint16)
    high = np.bitwise_or.reduce((stored >> 4) << 2 * np.arange(8, dtype=np.uint16), axis=1)
    low = packed((stored & 15).astype(np.uint8).reshape(-1, 4, 2), 4, 2)
    return joined(len(d_S), half(d_S), high, low, _nibbles(codes_NB))


def _weights(x: np.ndarray, x_NB: np.ndarray, importance: np.ndarray | None, block: int) -> np.ndarray:
    return x_NB * x_NB if importance is None else importance_weights(x, importance, 32, over=block, factor=2)


def _scales(x_NB: np.ndarray, w_NB: np.ndarray) -> np.ndarray:
    """[B]; of 16 grids, around the one in which the largest value is VALUES[0], the one that leaves the least error."""
    extreme_B = largest(x_NB)
    zeros_B = np.abs(extreme_B) < NOTHING
    extreme_B = np.where(zeros_B, ONE, extreme_B)
    values_NB, terms_NB, products_NB = (np.empty_like(x_NB) for _ in range(3))

    def sums(inverse_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        np.multiply(x_NB, inverse_B, out=terms_NB)
        np.take(VALUES[_CODES], _places(terms_NB), out=values_NB, mode="clip")
        np.multiply(w_NB, values_NB, out=terms_NB)
        sum_wvx_B = total(np.multiply(terms_NB, x_NB, out=products_NB))
        return sum_wvx_B, total(np.multiply(terms_NB, values_NB, out=terms_NB))

    sum_wvx_B, sum_wvv_B = sums(ONE / (-extreme_B / VALUES[0]))
    scale_B = ratio(sum_wvx_B, sum_wvv_B)
    best_B = scale_B * sum_wvx_B
    for t in range(-7, 8):
        sum_wvx_B, sum_wvv_B = sums((np.float32(t) + VALUES[0]) / extreme_B)
        better_B = (sum_wvv_B > 0) & (sum_wvx_B * sum_wvx_B > best_B * sum_wvv_B)
        np.putmask(scale_B, better_B, sum_wvx_B / sum_wvv_B)
        np.putmask(best_B, better_B, scale_B * sum_wvx_B)
    return np.where(zeros_B, np.float32(0), scale_B)


def _places(scaled: np.ndarray) -> np.ndarray:
    """In _CODES."""
    twice = np.floor(scaled + scaled)
    return np.clip(twice, _TWICE[0], _TWICE[-1], out=twice).astype(np.intp) - int(_TWICE[0])


def _nibbles(codes_NB: np.ndarray) -> np.ndarray:
    """[B, 16]: of 32 codes, a byte holds those at l and l + 16."""
    return packed(codes_NB.T.reshape(-1, 2, 16), 4, 1)
