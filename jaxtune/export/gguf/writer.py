"""GGUF, the container, version 3: a header, key/values, the list of tensors, then their data, all little-endian.

A value's type is that of its numpy scalar (`np.uint32(8)`), or bool, str, or an array of one of these. Shapes are
numpy's here; the file lists them with the fastest dimension first.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jaxtune.export.gguf.quants.types import TensorType, nbytes

ALIGNMENT = 32
"""Of every tensor, counted from the beginning of the data, and of that beginning itself."""

QUANTIZATION_VERSION = 2
"""Of the layout of blocks, as `general.quantization_version` says it."""

MAGIC, VERSION = b"GGUF", 3
BOOL, STRING, ARRAY = 7, 8, 9
SCALARS: dict[np.dtype, int] = {
    np.dtype(np.uint8): 0,
    np.dtype(np.int8): 1,
    np.dtype(np.uint16): 2,
    np.dtype(np.int16): 3,
    np.dtype(np.uint32): 4,
    np.dtype(np.int32): 5,
    np.dtype(np.float32): 6,
    np.dtype(np.uint64): 10,
    np.dtype(np.int64): 11,
    np.dtype(np.float64): 12,
}


class TensorInfo(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: TensorType

    @property
    def nbytes(self) -> int:
        return nbytes(self.shape, self.type)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Sequence[TensorInfo],
    encoded: Callable[[TensorInfo], np.ndarray],
) -> None:
    """`encoded(info)` gives a tensor's bytes; it is asked once for each, in order, and let go before the next."""
    with path.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        start = 0
        for info in tensors:
            dims = info.shape[::-1]
            file.write(_string(info.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
            file.write(struct.pack("<IQ", info.type, start))
            start += info.nbytes + -info.nbytes % ALIGNMENT
        _pad(file)
        for info in tensors:
            data = encoded(info)
            if data.nbytes != info.nbytes:
                raise ValueError(f"{info.name}: {data.nbytes} bytes for {info.nbytes}")
            file.write(data)
            _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % ALIGNMENT))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(value: Any) -> bytes:
    """The type's number, then the value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<IB", BOOL, value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, SCALARS[value.dtype], len(value)) + _little_endian(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    return struct.pack("<I", SCALARS[value.dtype]) + _little_endian(value)


def _little_endian(value: np.ndarray | np.generic) -> bytes:
    return value.astype(value.dtype.newbyteorder("<")).tobytes()
