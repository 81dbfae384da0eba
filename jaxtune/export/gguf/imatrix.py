"""Importance matrices: how much the errors of each column of a weight count, as `llama-imatrix` measures it.

For each weight it holds sums of the squares of what went into it, and over how many inputs. Files are GGUF, or of an
older form of names and numbers behind one another (`.dat`).
"""

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxtune.errors import CheckpointError
from jaxtune.export.gguf.quants import TensorType
from jaxtune.export.gguf.reader import GGUF, read_gguf
from jaxtune.export.gguf.writer import MAGIC

Importance = Mapping[str, np.ndarray]
"""GGUF name -> float32 [columns], or [experts, columns]."""


def read_imatrix(path: str | Path) -> Importance:
    path = Path(path)
    try:
        found = _read(path)
        for name, numbers in found.items():
            if not (np.isfinite(numbers) & (numbers >= 0)).all():
                raise ValueError(f"{name} has numbers that are negative or not finite")
        return found
    except (OSError, ValueError, KeyError, struct.error, CheckpointError) as error:
        why = error.found if isinstance(error, CheckpointError) else error
        raise CheckpointError(
            f"imatrix_file={str(path)!r} is not an importance matrix: {why}",
            expected="a file that save_imatrix or llama-imatrix wrote, GGUF or .dat.",
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


def _read(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    return _from_gguf(read_gguf(path)) if is_gguf else _from_dat(_Reader(path.read_bytes()))


def _from_gguf(file: GGUF) -> dict[str, np.ndarray]:
    arrays = {}
    for name, tensor in file.tensors.items():
        if tensor.info.type is not TensorType.F32:
            raise ValueError(f"{name} is of type {tensor.info.type.name}, not F32")
        arrays[name] = tensor.data.view("<f4").reshape(tensor.info.shape)
    names = [name.removesuffix(".in_sum2") for name in arrays if name.endswith(".in_sum2")]
    if not names:
        raise ValueError("it has no tensor <name>.in_sum2")
    return {name: _mean(arrays[f"{name}.in_sum2"], np.rint(arrays[f"{name}.counts"])) for name in names}


def _mean(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """float32 [columns] or [experts, columns]; 1 for experts that no token went to."""
    means = np.divide(sums, counts, out=np.ones_like(sums), where=counts > 0)
    return means[0] if len(means) == 1 else means


class _Reader:
    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        (size,) = self.numbers("i")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def floats(self, count: int) -> np.ndarray:
        self.at += 4 * count
        return np.frombuffer(self.data, "<f4", count, self.at - 4 * count)


def _from_dat(reader: _Reader) -> dict[str, np.ndarray]:
    (entries,) = reader.numbers("i")
    if entries < 1:
        raise ValueError("it has no entries")
    found = {}
    for _ in range(entries):
        name = reader.text()
        calls, count = reader.numbers("ii")
        found[name] = reader.floats(count) / np.float32(max(calls, 1))
    return found
