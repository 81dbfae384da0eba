"""Codes and scales into bytes."""

import numpy as np


class DoesNotFit(ArithmeticError):
    """A value or a scale that its type cannot hold."""


def half(x: np.ndarray) -> np.ndarray:
    """As float16. What is beyond its range raises."""
    rounded = x.astype(np.float16)
    if not np.isfinite(rounded).all():
        raise DoesNotFit
    return rounded


def packed(codes: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The uint8 codes that lie along `axis` in one byte, each `bits` above the one before."""
    shape = [1] * codes.ndim
    shape[axis] = -1
    shifts = (bits * np.arange(codes.shape[axis], dtype=np.uint8)).reshape(shape)
    return np.bitwise_or.reduce(codes << shifts, axis=axis)


def unpacked(stored: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """The inverse: the codes of a byte along a new `axis`."""
    shifts = (bits * np.arange(8 // bits, dtype=np.uint8)).reshape(-1, *[1] * (stored.ndim - axis))
    return np.expand_dims(stored, axis) >> shifts & np.uint8(2**bits - 1)


def joined(blocks: int, *fields: np.ndarray) -> np.ndarray:
    """The fields of each block behind one another, as bytes. [blocks, bytes of a block]"""
    return np.concatenate(
        [np.ascontiguousarray(field).reshape(blocks, -1).view(np.uint8) for field in fields], axis=1
    )
