"""From the bytes of GGUF's tensor types back to numbers: what a file holds, as whoever runs it will read it.

B counts blocks, J the sub-blocks of one.
"""

from collections.abc import Callable

import ml_dtypes
import numpy as np

from jaxtune.export.gguf.quants import search
from jaxtune.export.gguf.quants.books import levels
from jaxtune.export.gguf.quants.iq4 import VALUES
from jaxtune.export.gguf.quants.k_quants import of_pairs_of_six_bits
from jaxtune.export.gguf.quants.pack import unpacked
from jaxtune.export.gguf.quants.types import TensorType

_MAGNITUDES = {
    "IQ2_XXS": (8, 25, 43),
    "IQ2_XS": (8, 25, 43),
    "IQ2_S": (8, 25, 43),
    "IQ3_XXS": (4, 12, 20, 28, 36, 44, 52, 62),
    "IQ3_S": (1, 3, 5, 7, 9, 11, 13, 15),
    "IQ1_S": (-1, 0, 1),
}
"""What the levels of a code book stand for."""
_HALF, _SHIFT = np.float32(0.5), np.float32(0.125)


def decode(stored: np.ndarray, type: TensorType) -> np.ndarray:
    """uint8 [..., bytes of a row] -> float32 [..., numbers of a row]."""
    blocks = np.ascontiguousarray(stored).reshape(-1, type.block_bytes)
    with np.errstate(invalid="ignore"):  # scales that are infinite, in a file that is broken
        return _DECODERS[type](blocks).reshape(*stored.shape[:-1], -1)


def _fields(blocks: np.ndarray, *sizes: int) -> list[np.ndarray]:
    """The parts of so many bytes, one after the other, of each block; the last one is what is left."""
    parts = np.split(blocks, np.cumsum(sizes), axis=1)
    return [np.ascontiguousarray(part) for part in parts]


def _scale(half: np.ndarray) -> np.ndarray:
    """Two bytes of each block -> [B, 1]."""
    return half.view(np.float16).astype(np.float32)


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float32)


def _f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(np.float16).astype(np.float32)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view(ml_dtypes.bfloat16).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    d, codes = _fields(blocks, 2)
    return _scale(d) * codes.view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    d, codes = _fields(blocks, 2)
    return _scale(d) * (_nibbles(codes) - np.float32(8))


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    d, m, codes = _fields(blocks, 2, 2)
    return _scale(d) * _nibbles(codes) + _scale(m)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    d, high, low = _fields(blocks, 2, 4)
    return _scale(d) * (_five_bits(low, high) - np.float32(16))


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    d, m, high, low = _fields(blocks, 2, 2, 4)
    return _scale(d) * _five_bits(low, high) + _scale(m)


def _nibbles(stored: np.ndarray) -> np.ndarray:
    """Of each 32 codes, a byte holds those at l and l + 16. [B, codes]"""
    return unpacked(stored.reshape(len(stored), -1, 16), 4, 2).reshape(len(stored), -1)


def _five_bits(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return _nibbles(low) | unpacked(high, 1, 2).reshape(len(high), -1) << 4


def _q2_k(blocks: np.ndarray) -> np.ndarray:
    both, codes, d, d_min = _fields(blocks, 16, 64, 2)
    return _affine(_two_bits(codes), _scale(d) * (both & 15), _scale(d_min) * (both >> 4))


def _q3_k(blocks: np.ndarray) -> np.ndarray:
    high, low, scales, d = _fields(blocks, 32, 64, 12)
    above = unpacked(scales[:, 8:], 2, 1).reshape(-1, 16)
    scales = unpacked(scales[:, :8], 4, 1).reshape(-1, 16) | above << 4
    codes = _two_bits(low) | unpacked(high, 1, 1).reshape(-1, 256) << 2
    return _symmetric(codes.astype(np.float32) - 4, _scale(d) * (scales.astype(np.float32) - 32))


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    d, d_min, both, codes = _fields(blocks, 2, 2, 12)
    scales, minimums = of_pairs_of_six_bits(search, both)
    return _affine(_pairs_of_32(codes), _scale(d) * scales, _scale(d_min) * minimums)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    d, d_min, both, high, low = _fields(blocks, 2, 2, 12, 32)
    scales, minimums = of_pairs_of_six_bits(search, both)
    codes = _pairs_of_32(low) | unpacked(high, 1, 1).reshape(-1, 256) << 4
    return _affine(codes, _scale(d) * scales, _scale(d_min) * minimums)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low, high, scales, d = _fields(blocks, 128, 64, 16)
    codes = unpacked(low.reshape(-1, 2, 2, 32), 4, 2).reshape(-1, 256) | _two_bits(high) << 4
    return _symmetric(codes.astype(np.float32) - 32, _scale(d) * scales.view(np.int8))


def _affine(codes: np.ndarray, scale_BJ: np.ndarray, minimum_BJ: np.ndarray) -> np.ndarray:
    by_sub_block = codes.reshape(*scale_BJ.shape, -1)
    return scale_BJ[:, :, None] * by_sub_block - minimum_BJ[:, :, None]


def _symmetric(codes: np.ndarray, scale_BJ: np.ndarray) -> np.ndarray:
    return scale_BJ[:, :, None] * codes.reshape(*scale_BJ.shape, -1)


def _two_bits(stored: np.ndarray) -> np.ndarray:
    """Of each 128 codes, a byte holds those at l, l + 32, l + 64 and l + 96."""
    return unpacked(stored.reshape(-1, 2, 32), 2, 2).reshape(-1, 256)


def _pairs_of_32(stored: np.ndarray) -> np.ndarray:
    """Of each 64 codes, a byte holds those at l and l + 32."""
    return unpacked(stored.reshape(-1, 4, 32), 4, 2).reshape(-1, 256)


def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    d, codes = _fields(blocks, 2)
    return _scale(d) * VALUES[_nibbles(codes)]


def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    d, high, low, codes = _fields(blocks, 2, 2, 4)
    above = (high.view(np.uint16) >> 2 * np.arange(8, dtype=np.uint16) & 3).astype(np.uint8)
    scales = unpacked(low, 4, 2).reshape(-1, 8) | above << 4
    return _symmetric(VALUES[_nibbles(codes)], _scale(d) * (scales.astype(np.float32) - 32))


def _iq2_xxs(blocks: np.ndarray) -> np.ndarray:
    d, rest = _fields(blocks, 2)
    entries, together = np.split(rest.reshape(-1, 8, 8), 2, axis=2)
    scales, signs = _scales_and_signs(together)
    return _from_book("IQ2_XXS", entries, signs, _scale(d) * (_HALF + scales) / 4)


def _iq2_xs(blocks: np.ndarray) -> np.ndarray:
    d, both, scales = _fields(blocks, 2, 64)
    both = both.view(np.uint16)
    signs = _with_eighth((both >> 9).astype(np.uint8))
    return _from_book("IQ2_XS", both & 511, signs, _scale(d) * (_HALF + _in_nibbles(scales)) / 4)


def _iq2_s(blocks: np.ndarray) -> np.ndarray:
    d, low, signs, high, scales = _fields(blocks, 2, 32, 32, 8)
    entries = low | unpacked(high, 2, 2).reshape(-1, 32).astype(np.uint16) << 8
    return _from_book("IQ2_S", entries, signs, _scale(d) * (_HALF + _in_nibbles(scales)) / 4)


def _iq3_xxs(blocks: np.ndarray) -> np.ndarray:
    d, entries, together = _fields(blocks, 2, 64)
    scales, signs = _scales_and_signs(together)
    return _from_book("IQ3_XXS", entries, signs, _scale(d) * (_HALF + scales) / 2)


def _iq3_s(blocks: np.ndarray) -> np.ndarray:
    d, low, high, signs, scales = _fields(blocks, 2, 64, 8, 32)
    entries = low | unpacked(high, 1, 2).reshape(-1, 64).astype(np.uint16) << 8
    return _from_book("IQ3_S", entries, signs, _scale(d) * (1 + 2 * _in_nibbles(scales)))


def _iq1_s(blocks: np.ndarray) -> np.ndarray:
    d, low, rest = _fields(blocks, 2, 32)
    rest = rest.view(np.uint16)
    high = rest[:, :, None] >> 3 * np.arange(4, dtype=np.uint16) & 7
    shift = np.where(rest >> 15, -_SHIFT, _SHIFT)
    entries = low | high.reshape(-1, 32) << 8
    return _moved(entries, shift, _scale(d) * (2 * (rest >> 12 & 7).astype(np.float32) + 1))


def _iq1_m(blocks: np.ndarray) -> np.ndarray:
    low, rest, scales = _fields(blocks, 32, 16)
    scales = scales.view(np.uint16)
    d = np.bitwise_or.reduce(scales >> 12 << 4 * np.arange(4, dtype=np.uint16), axis=1, keepdims=True)
    codes = (scales[:, :, None] >> 3 * np.arange(4, dtype=np.uint16) & 7).reshape(-1, 16)
    both = unpacked(rest, 4, 2).reshape(-1, 32)
    entries = low | (both & 7).astype(np.uint16) << 8
    return _moved(
        entries, np.where(both >> 3, -_SHIFT, _SHIFT), _scale(d) * (2 * codes.astype(np.float32) + 1)
    )


def _in_nibbles(stored: np.ndarray) -> np.ndarray:
    return unpacked(stored, 4, 2).reshape(len(stored), -1).astype(np.float32)


def _scales_and_signs(stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each four bytes: the code of a scale in the upper four bits, [B, J], and four times seven signs, [B, 4 J]."""
    together = np.ascontiguousarray(stored).reshape(len(stored), -1).view(np.uint32)
    signs = (together[:, :, None] >> 7 * np.arange(4, dtype=np.uint32) & 127).astype(np.uint8)
    return (together >> 28).astype(np.float32), _with_eighth(signs.reshape(len(stored), -1))


def _with_eighth(signs: np.ndarray) -> np.ndarray:
    """Of eight signs the last makes the number of negatives even."""
    return signs | (np.bitwise_count(signs) & 1) << 7


def _from_book(name: str, entries: np.ndarray, signs: np.ndarray, scale_BJ: np.ndarray) -> np.ndarray:
    """`signs` has a bit for each number: a byte for each eight of them."""
    values = _values(name)[entries].reshape(*signs.shape, 8)
    values = np.where(unpacked(signs, 1, 2), -values, values)
    return _symmetric(values, scale_BJ)


def _moved(entries: np.ndarray, shift: np.ndarray, scale_BJ: np.ndarray) -> np.ndarray:
    """Values that all are moved by the `shift` of their part of the block."""
    values = _values("IQ1_S")[entries].reshape(*shift.shape, -1)
    return _symmetric(values + shift[:, :, None], scale_BJ)


def _values(name: str) -> np.ndarray:
    """[entries, numbers of a group]"""
    return np.asarray(_MAGNITUDES[name], np.float32)[levels(name)]


_DECODERS: dict[TensorType, Callable[[np.ndarray], np.ndarray]] = {
    TensorType.F32: _f32,
    TensorType.F16: _f16,
    TensorType.BF16: _bf16,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q5_0: _q5_0,
    TensorType.Q5_1: _q5_1,
    TensorType.Q8_0: _q8_0,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.IQ1_S: _iq1_s,
    TensorType.IQ1_M: _iq1_m,
    TensorType.IQ2_XXS: _iq2_xxs,
    TensorType.IQ2_XS: _iq2_xs,
    TensorType.IQ2_S: _iq2_s,
    TensorType.IQ3_XXS: _iq3_xxs,
    TensorType.IQ3_S: _iq3_s,
    TensorType.IQ4_NL: _iq4_nl,
    TensorType.IQ4_XS: _iq4_xs,
}
