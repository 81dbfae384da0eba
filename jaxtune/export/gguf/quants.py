"""From arrays to the bytes of GGUF's tensor types. Blocks lie along the last axis and never cross a row.

Q8_0, for 32 values: a float16 scale d = max|x| / 127, then 32 signed bytes, x * (1 / d) rounded half away from zero,
with the d of before its own rounding. That is llama.cpp's arithmetic, and the bytes are equal to its bytes.
"""

import enum
import math

import ml_dtypes
import numpy as np

from jaxtune.errors import OptionError

Q8_BLOCK = 32
_CHUNK = 1 << 22
"""Numbers that are converted at once, so that temporaries stay small next to the tensor."""


class TensorType(enum.IntEnum):
    """By their numbers in the file."""

    F32 = 0
    F16 = 1
    Q8_0 = 8
    BF16 = 30


_BLOCKS = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q8_0: (Q8_BLOCK, 2 + Q8_BLOCK),
    TensorType.BF16: (1, 2),
}
"""Numbers in a block, bytes of a block."""


def nbytes(shape: tuple[int, ...], type: TensorType) -> int:
    numbers, size = _BLOCKS[type]
    return math.prod(shape) // numbers * size


def encode(array: np.ndarray, type: TensorType, name: str) -> np.ndarray:
    """Any float array -> its bytes as uint8. A value that the type cannot hold raises, with the tensor's `name`."""
    numbers, size = _BLOCKS[type]
    blocks = array.reshape(-1, numbers)
    out = np.empty((len(blocks), size), np.uint8)
    step = max(1, _CHUNK // numbers)
    for start in range(0, len(blocks), step):
        chunk = blocks[start : start + step].astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # reported here, with the tensor's name
            done, scales = _ENCODERS[type](chunk)
        if not np.isfinite(scales).all():
            raise OptionError(
                f"{name} holds values that {type.name} cannot: its largest is {np.abs(chunk).max():g}.",
                expected="values, and for q8_0 scales, within float16's 65504.",
                fix='Use quantization_method="bf16" or "f32".',
            )
        out[start : start + step] = done
    return out.reshape(-1)


def _f32(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.view(np.uint8), x


def _f16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = x.astype(np.float16)
    return half.view(np.uint8), half


def _bf16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    brain = x.astype(ml_dtypes.bfloat16)
    return brain.view(np.uint8), brain


def _q8_0(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    codes = _round_half_away(x * inverse).astype(np.int8)
    scales = d.astype(np.float16)
    return np.concatenate([scales.view(np.uint8), codes.view(np.uint8)], axis=1), scales


def _round_half_away(x: np.ndarray) -> np.ndarray:
    whole = np.trunc(x)
    return whole + np.trunc(2 * (x - whole))  # both steps are exact, which adding a half would not be


_ENCODERS = {TensorType.F32: _f32, TensorType.F16: _f16, TensorType.Q8_0: _q8_0, TensorType.BF16: _bf16}
