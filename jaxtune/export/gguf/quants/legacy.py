"""The types of 32 values with one scale, and perhaps a minimum, as float16."""

import numpy as np

from jaxtune.export.gguf.quants.pack import half, joined, packed
from jaxtune.export.gguf.quants.search import (
    WEIGHTED_STEPS,
    affine,
    importance_weights,
    inverse,
    largest,
    smallest,
    sub_blocks,
    symmetric,
)

BLOCK = 32


def q8_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """Rounds half away from zero, with the scale as it was before its own rounding."""
    x_BN = x.reshape(-1, BLOCK)
    d = np.abs(x_BN).max(axis=1, keepdims=True) / np.float32(127)
    scaled = _divided(x_BN, d)
    whole = np.trunc(scaled)
    codes = whole + np.trunc(2 * (scaled - whole))  # both steps are exact, which adding a half would not be
    return joined(len(d), half(d), codes.astype(np.int8))


def q4_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, codes = _symmetric(x, importance, 8)
    return joined(len(d), d, _nibbles(codes))


def q5_0(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, codes = _symmetric(x, importance, 16)
    return joined(len(d), d, _fifth_bits(codes), _nibbles(codes & 15))


def q4_1(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, m, codes = _affine(x, importance, 15)
    return joined(len(d), d, m, _nibbles(codes))


def q5_1(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    d, m, codes = _affine(x, importance, 31)
    return joined(len(d), d, m, _fifth_bits(codes), _nibbles(codes & 15))


def _symmetric(x: np.ndarray, importance: np.ndarray | None, top: int) -> tuple[np.ndarray, np.ndarray]:
    if importance is not None:
        d, codes_NB = symmetric(sub_blocks(x, BLOCK), _weights(x, importance), top)
        return half(d), (codes_NB.T + top).astype(np.uint8)
    x_BN = x.reshape(-1, BLOCK)
    d = (largest(x_BN.T)[:, None] + np.float32(0)) / np.float32(-top)  # of a zero without its sign
    codes = np.trunc(_divided(x_BN, d, top + 0.5))
    return half(d), np.minimum(codes, 2 * top - 1).astype(np.uint8)


def _affine(
    x: np.ndarray, importance: np.ndarray | None, top: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if importance is not None:
        found = affine(sub_blocks(x, BLOCK), _weights(x, importance), top, WEIGHTED_STEPS)
        return half(found.scale_B), half(-found.minimum_B), found.codes_NB.T.astype(np.uint8)
    x_BN = x.reshape(-1, BLOCK)
    low = smallest(x_BN.T)[:, None]
    d = np.abs(x_BN.max(axis=1, keepdims=True) - low) / np.float32(top)  # of zeros without a sign
    codes = np.trunc(_divided(x_BN - low, d, 0.5))
    return half(d), half(low), np.minimum(codes, top).astype(np.uint8)


def _divided(x_BN: np.ndarray, d: np.ndarray, offset: float = 0.0) -> np.ndarray:
    """x * (1 / d) + offset. 0 where 1 / d is infinite: of an infinity, llama.cpp's conversion to integers makes 0."""
    inverse_B = inverse(d)
    return np.where(np.isinf(inverse_B), np.float32(0), x_BN * inverse_B + np.float32(offset))


def _weights(x: np.ndarray, importance: np.ndarray) -> np.ndarray:
    return importance_weights(x, importance, BLOCK, over=x.shape[1], factor=1)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """[B, 16]: a byte holds the codes at l and l + 16."""
    return packed(codes.reshape(-1, 2, 16), 4, 1)


def _fifth_bits(codes: np.ndarray) -> np.ndarray:
    """[B, 4], element l in bit l."""
    return packed(codes.reshape(-1, 4, 8) >> 4, 1, 2)
