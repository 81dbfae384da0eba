"""Reads a GGUF file: its key/values, its list of tensors, and their bytes as views into a memory map.

What `writer` wrote comes back as it was given: numbers as numpy scalars of their type, shapes in numpy's order.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import CheckpointError
from jaxtune.export.gguf.quants.types import TensorType
from jaxtune.export.gguf.writer import ALIGNMENT, ARRAY, BOOL, MAGIC, SCALARS, STRING, VERSION, TensorInfo

_DTYPES = {number: dtype.newbyteorder("<") for dtype, number in SCALARS.items()}


class Tensor(NamedTuple):
    info: TensorInfo
    data: np.ndarray
    """Its bytes, read only."""

    @property
    def rows(self) -> np.ndarray:
        """[rows, bytes of a row]"""
        return self.data.reshape(math.prod(self.info.shape[:-1]), -1)


class GGUF(NamedTuple):
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: str | Path) -> GGUF:
    """Everything is checked but the values themselves."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        return _read(data)
    except struct.error:
        found = "it ends before its list of tensors does"
    except (OSError, ValueError) as error:
        found = str(error)
    raise CheckpointError(
        f"{path} is not a whole GGUF file: {found}.",
        expected="a file that llama.cpp reads.",
        fix="Write it again; the copy or the transfer that made it broke off.",
    )


class _Reader:
    """Takes one thing after the other."""

    def __init__(self, data: np.ndarray):
        self._data, self.at = memoryview(data), 0

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self._data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def string(self) -> str:
        (length,) = self.numbers("Q")
        return bytes(self.numbers(f"{min(length, len(self._data) + 1)}s")[0]).decode()

    def array(self, dtype: np.dtype, count: int) -> np.ndarray:
        found = np.frombuffer(self._data, dtype, count, self.at)
        self.at += found.nbytes
        return found


def _read(data: np.ndarray) -> GGUF:
    reader = _Reader(data)
    magic, version = reader.numbers("4sI")
    if magic != MAGIC or version != VERSION:
        raise ValueError(f"it begins with {magic!r} and version {version}, not with {MAGIC!r} and {VERSION}")
    count, keys = reader.numbers("QQ")
    metadata = dict(_pairs(keys, lambda: (reader.string(), _value(reader)), "key"))
    places = dict(_pairs(count, lambda: _tensor_info(reader), "tensor"))
    start = reader.at + -reader.at % ALIGNMENT
    tensors, end = {}, start
    for info, offset in places.values():
        at, end = end, start + offset + info.nbytes
        if start + offset != at + -at % ALIGNMENT or end > len(data):
            where = "beyond the end" if end > len(data) else "not behind the tensor before it"
            raise ValueError(f"{info.name} lies {where}")
        tensors[info.name] = Tensor(info, data[end - info.nbytes : end])
    if len(data) not in (end, end + -end % ALIGNMENT):  # what fills up the last one is not always written
        raise ValueError(f"it has {len(data):,} bytes, and its tensors end at {end:,}")
    return GGUF(metadata, tensors)


def _pairs(count: int, read: Callable[[], tuple[str, Any]], what: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    names = set()
    for _ in range(count):
        name, value = read()
        if name in names:
            raise ValueError(f"it has the {what} {name} twice")
        names.add(name)
        found.append((name, value))
    return found


def _value(reader: _Reader, kind: int | None = None) -> Any:
    if kind is None:
        (kind,) = reader.numbers("I")
    if kind == STRING:
        return reader.string()
    if kind == BOOL:
        return bool(reader.numbers("B")[0])
    if kind == ARRAY:
        kind, count = reader.numbers("IQ")
        if kind in _DTYPES:
            return reader.array(_DTYPES[kind], count)
        return [_value(reader, kind) for _ in range(count)]
    if kind not in _DTYPES:
        raise ValueError(f"a value is of type {kind}, which GGUF does not have")
    return reader.array(_DTYPES[kind], 1)[0]


def _tensor_info(reader: _Reader) -> tuple[str, tuple[TensorInfo, int]]:
    name = reader.string()
    (dims,) = reader.numbers("I")
    shape = reader.numbers(f"{min(dims, 5)}Q")[::-1]
    kind, offset = reader.numbers("IQ")
    if kind not in set(TensorType):
        raise ValueError(f"{name} is of type {kind}, which jaxtune does not write")
    type = TensorType(kind)
    if not shape or shape[-1] % type.block:
        raise ValueError(f"{name} has rows of {shape[-1] if shape else 0}, no whole blocks of {type.name}")
    return name, (TensorInfo(name, shape, type), offset)
