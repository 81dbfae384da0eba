"""Checksums of what went into a file, to compare with what comes out of it."""

import zlib
from collections.abc import Callable

import numpy as np

AGAIN = "Save again. If it happens again, this machine's memory or its disk is at fault."
"""What to do where bytes have changed."""


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
    return zlib.crc32(array.reshape(-1).view(np.uint8))
