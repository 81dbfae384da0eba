"""Writes a safetensors file tensor by tensor: the header first, from shapes alone, then each tensor as it comes.

The file is 8 bytes with the header's length, the header (JSON), then the tensors' bytes end to end.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.export.ahead import ahead

_ALIGNMENT = 8  # of where the data begins; the header is padded with spaces
_NAMES = {
    np.dtype(np.float64): "F64",
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e5m2): "F8_E5M2",
    np.dtype(np.int64): "I64",
    np.dtype(np.int32): "I32",
    np.dtype(np.int16): "I16",
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(np.bool_): "BOOL",
}


class Entry(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """Numbers in the tensor."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], read: Callable[[str], np.ndarray]) -> None:
    """`read(name)` is asked once for every entry, by threads that are some tensors ahead of the writing."""
    # Wide dtypes first, so that every tensor is aligned to its own.
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        stop = start + entry.nbytes
        header[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        jobs = ((entry, entry.nbytes) for entry in entries)
        for _, array in ahead(jobs, lambda entry: read(entry.name)):
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
