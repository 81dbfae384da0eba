"""Code books: groups of 8 or 4 small numbers, of which only some are written, by their number in the book."""

import functools
from pathlib import Path

import numpy as np

from jaxtune.export.gguf.quants.search import total

_FILE = Path(__file__).with_name("code_books.npz")
_SHELLS = {"IQ2_S": 1, "IQ2_XXS": 2, "IQ2_XS": 2, "IQ3_XXS": 2, "IQ3_S": 3, "IQ1_S": 3}


class Book:
    """P entries of G numbers, each one of a few levels: 0, 1, 2, ...

    A group of levels has a place, whether the book has it or not. One that it has not has some of the entries as
    neighbours: those at the `shells` smallest distances from it, the nearest first."""

    def __init__(self, levels_PG: np.ndarray, shells: int):
        self.levels, self.group = int(levels_PG.max()) + 1, levels_PG.shape[1]
        self.levels_GP = np.ascontiguousarray(levels_PG.T).astype(np.float32)
        self._radix = np.float32(self.levels) ** np.arange(self.group, dtype=np.float32)
        places = np.indices((self.levels,) * self.group).reshape(self.group, -1)[::-1].T  # [U, G]
        self._entry = np.full(len(places), -1, np.int16)
        self._entry[(levels_PG @ self._radix).astype(np.int64)] = np.arange(len(levels_PG))
        a, b = places.astype(np.float32), levels_PG.astype(np.float32)
        distance_UP = ((a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * a @ b.T).astype(np.int16)
        within_U = np.full(len(places), -1)
        for _ in range(shells):
            beyond_UP = np.where(distance_UP > within_U[:, None], distance_UP, np.iinfo(np.int16).max)
            within_U = beyond_UP.min(axis=1)
        u, p = np.nonzero(distance_UP <= within_U[:, None])
        order = np.lexsort((p, distance_UP[u, p], u))
        self._count = np.bincount(u, minlength=len(places)).astype(np.int16)
        ranks = np.arange(len(u)) - np.repeat(np.cumsum(self._count) - self._count, self._count)
        self._neighbours = np.zeros((self._count.max(), len(places)), np.int16)
        self._neighbours[ranks, u] = p[order]

    def entries(
        self,
        levels_GC: np.ndarray,
        values_GP: np.ndarray,
        x_GC: np.ndarray,
        w_GC: np.ndarray,
        scale_C: np.ndarray,
        shift_C: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """For C groups the numbers of their entries, and which of them the book has not. For those it is the neighbour
        that leaves the least error, weighted with w, if entries mean scale * (values + shift)."""
        place_C = (self._radix @ levels_GC.astype(np.float32)).astype(np.int32)
        entry_C = self._entry[place_C]
        missing_C = entry_C < 0
        missing = np.flatnonzero(missing_C)
        count = self._count[place_C[missing]]
        missing = missing[np.argsort(-count, kind="stable")]  # those with n neighbours or more come first
        having = np.searchsorted(np.sort(-count), -np.arange(len(self._neighbours)) - 1, side="right")
        place, scale = place_C[missing], scale_C[missing]
        x, w = x_GC.take(missing, axis=1), w_GC.take(missing, axis=1)
        shift = None if shift_C is None else shift_C[missing]
        best, entry = np.full(len(missing), np.inf, np.float32), np.zeros(len(missing), np.int16)
        for n, neighbours_U in zip(having, self._neighbours, strict=True):
            if not n:
                break
            candidate = neighbours_U[place[:n]]
            values_GN = values_GP.take(candidate, axis=1)
            if shift is not None:
                values_GN += shift[:n]
            off_GN = scale[:n] * values_GN - x[:, :n]
            error = total(w[:, :n] * off_GN * off_GN)
            better = error < best[:n]
            np.putmask(best[:n], better, error)
            np.putmask(entry[:n], better, candidate)
        entry_C[missing] = entry
        return entry_C, missing_C


@functools.cache
def book(name: str) -> Book:
    return Book(levels(name), _SHELLS[name])


@functools.cache
def levels(name: str) -> np.ndarray:
    """A book's entries, [P, G]."""
    with np.load(_FILE) as books:
        return books[name]


def groups(a_NB: np.ndarray, group: int) -> np.ndarray:
    """[N, B] -> [G, C], the groups of a sub-block behind those of the others: C = K * B."""
    return np.ascontiguousarray(a_NB.reshape(-1, group, a_NB.shape[1]).swapaxes(0, 1)).reshape(group, -1)


def ungrouped(a_GC: np.ndarray, B: int) -> np.ndarray:
    return a_GC.reshape(len(a_GC), -1, B).swapaxes(0, 1).reshape(-1, B)
