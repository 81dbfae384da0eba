"""Packed rows as attention takes them: the tokens of a micro-batch, row after row, as pieces laid end to end.

A piece is a whole sample, or padding. Kernels reserve memory for as many pieces as there may be, each as long as the
longest may be. An array [G, M] of lengths says both by its shape: G M pieces of at most R L / G tokens, together M
times the rows. Pieces stand in their order, in any of the places; the others are 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from jaxtune.data.layout import Shape

GRANULE = 64
"""The longest piece has a multiple of so many tokens, where rows have."""


class Packing(NamedTuple):
    """How many pieces there are in a micro-batch at most, and how long one is at most: a divisor of its tokens."""

    longest: int
    number: int

    @classmethod
    def of_step(cls, rows: Sequence[Sequence[int]], shape: Shape, other: Self | None = None) -> Self | None:
        """What fits samples of these lengths in all rows of a step, and what `other` fits; None if nothing is packed:
        no row has several samples."""
        if other is None and all(len(row) <= 1 for row in rows):
            return None
        longest = _divisor(shape.rows * shape.length, max(sample for row in rows for sample in row))
        longest, number = max(longest, other.longest if other else 0), other.number if other else 0
        numbers = (len(_pieces(part, shape.length, longest)) for part in _micro_batches(rows, shape))
        return cls(longest, max(number, *numbers))

    def lengths(self, rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
        """[G, M] for rows that fit."""
        pieces = _pieces(rows, length, self.longest)
        groups = len(rows) * length // self.longest
        lengths = np.zeros((groups, _bucket(-(-self.number // groups))), np.int32)
        lengths.reshape(-1)[: len(pieces)] = pieces
        return lengths


def piece_lengths(rows: Sequence[Sequence[int]], shape: Shape, packing: Packing | None = None) -> np.ndarray:
    """[A, G, M] for a step with samples of these lengths in all its rows; or [A, R, 1], each row's only sample, if no
    row has several and no `packing` is needed for other steps."""
    packing = Packing.of_step(rows, shape, packing)
    if packing is None:
        return np.array([sum(row) for row in rows], np.int32).reshape(*shape[:2], 1)
    return np.stack([packing.lengths(part, shape.length) for part in _micro_batches(rows, shape)])


def _micro_batches(rows: Sequence[Sequence[int]], shape: Shape) -> list[Sequence[Sequence[int]]]:
    return [rows[start : start + shape.rows] for start in range(0, shape.all_rows, shape.rows)]


def _divisor(tokens: int, least: int) -> int:
    """The smallest of `tokens` from `least` on, in granules if it can be."""
    granule = math.gcd(GRANULE, tokens)
    first = -(-least // granule) * granule
    return next(piece for piece in range(first, tokens + 1, granule) if tokens % piece == 0)


def _pieces(rows: Sequence[Sequence[int]], length: int, longest: int) -> list[int]:
    """Of rows of this length: samples, and padding in pieces that are short enough."""
    pieces: list[int] = []
    for row in rows:
        padding = length - sum(row)
        pieces += [*row, *[longest] * (padding // longest), padding % longest]
    return [piece for piece in pieces if piece]


def _bucket(count: int) -> int:
    """At least 2, because 1 says that rows are not packed; two steps to an octave, so that few programs are needed."""
    step = 2 ** max(0, (count - 1).bit_length() - 2)
    return max(2, -(-count // step) * step)
