"""Importance matrices: how much the errors of each column of a weight count, as `llama-imatrix` measures it.

For each weight it holds sums of the squares of what went into it, and over how many inputs. Files are GGUF, or of an
older form of names and numbers behind one another (`.dat`).
"""

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import CheckpointError

Importance = Mapping[str, np.ndarray]
"""GGUF name -> float32 [columns], or [experts, columns]."""

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value, by the number of its type."""
_STRING, _ARRAY, _F32 = 8, 9, 0


def read_imatrix(path: str | Path) -> Importance:
    path = Path(path)
    try:
        with path.open("rb") as file:
            found = _read(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for name, numbers in found.items():
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                raise ValueError(f"{name} has numbers that are negative or not finite")
        return found
    except (OSError, ValueError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"imatrix_file={str(path)!r} is not an importance matrix: {error}",
            expected="a file that llama-imatrix wrote, GGUF or .dat.",
            fix="Give the path of such a file, or leave imatrix_file out.",
        ) from error


def for_tensor(importance: Importance, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Of the tensor's columns, if they were measured. Another number of columns raises."""
    found = importance.get(name)
    if found is None:
        return None
    columns = (*shape[:-2], shape[-1])
    if found.size == math.prod(columns):
        return found.reshape(columns)
    if name == "token_embd.weight":  # rows are looked up, not multiplied: what was measured is something else
        return None
    raise CheckpointError(
        f"The importance matrix has {found.size} numbers for {name}.",
        expected=f"one for each column of {shape}.",
        fix="Take the importance matrix that was measured with this model.",
    )


class _Reader:
    def __init__(self, data: mmap.mmap, start: int):
        self.data, self.at = data, start

    def numbers(self, form: str) -> tuple[Any, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self, length: str) -> str:
        (size,) = self.numbers(length)
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def floats(self, count: int) -> np.ndarray:
        self.at += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.at - 4 * count)


def _read(data: mmap.mmap) -> dict[str, np.ndarray]:
    return _read_gguf(data) if data[:4] == b"GGUF" else _read_dat(_Reader(data, 0))


def _read_gguf(data: mmap.mmap) -> dict[str, np.ndarray]:
    reader = _Reader(data, 4)
    _, tensors, values = reader.numbers("IQQ")
    for _ in range(values):
        reader.text("Q")
        _skip(reader, *reader.numbers("I"))
    infos = []
    for _ in range(tensors):
        name = reader.text("Q")
        (dims,) = reader.numbers("I")
        shape = reader.numbers(f"{dims}Q")[::-1]
        infos.append((name, shape, *reader.numbers("IQ")))
    start = reader.at + -reader.at % 32
    arrays = {}
    for name, shape, kind, offset in infos:
        if kind != _F32:
            raise ValueError(f"{name} is of type {kind}, not float32")
        arrays[name] = _Reader(data, start + offset).floats(math.prod(shape)).reshape(shape)
    names = [name.removesuffix(".in_sum2") for name in arrays if name.endswith(".in_sum2")]
    if not names:
        raise ValueError("it has no tensor <name>.in_sum2")
    return {name: _mean(arrays[f"{name}.in_sum2"], np.rint(arrays[f"{name}.counts"])) for name in names}


def _skip(reader: _Reader, kind: int) -> None:
    if kind == _STRING:
        reader.text("Q")
    elif kind == _ARRAY:
        element, count = reader.numbers("IQ")
        for _ in range(count):
            _skip(reader, element)
    else:
        reader.at += _SIZES[kind]


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float32 [columns] or [experts, columns]; 1 for experts that no token went to."""
    means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
    return means[0] if len(means) == 1 else means


def _read_dat(reader: _Reader) -> dict[str, np.ndarray]:
    (entries,) = reader.numbers("i")
    if entries < 1:
        raise ValueError("it has no entries")
    found = {}
    for _ in range(entries):
        name = reader.text("i")
        calls, count = reader.numbers("ii")
        found[name] = reader.floats(count) / np.float32(max(calls, 1))
    return found
