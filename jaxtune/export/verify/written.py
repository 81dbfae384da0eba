"""What went into a file, to compare with what comes out of it: noted while it is written, a few rows of each tensor."""

import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

AGAIN = "Save again. If it happens again, this machine's memory or its disk is at fault."
"""What to do where bytes have changed."""

_SMALL, _ROWS = 1 << 14, 16
"""Tensors of at most so many numbers are kept whole, of larger ones so many rows, from the first to the last."""


class Sample(NamedTuple):
    places: np.ndarray
    """Which rows."""
    rows: np.ndarray
    """[places, columns]"""


def sample(array: np.ndarray) -> Sample:
    rows = array.reshape(-1, array.shape[-1])
    few = _ROWS if array.size > _SMALL else len(rows)
    places = np.unique(np.linspace(0, len(rows) - 1, few).astype(int))
    return Sample(places, rows[places])


class Checksums:
    """Of the bytes of tensors, by name."""

    def __init__(self) -> None:
        self._by_name: dict[str, int] = {}

    def of(self, read: Callable[[str], np.ndarray]) -> Callable[[str], np.ndarray]:
        """The same function, with what it gives noted."""

        def noted(name: str) -> np.ndarray:
            array = np.ascontiguousarray(read(name))
            self.note(name, array)
            return array

        return noted

    def note(self, name: str, array: np.ndarray) -> None:
        self._by_name[name] = _checksum(array)

    def agree(self, name: str, array: np.ndarray) -> bool:
        return self._by_name[name] == _checksum(array)


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
