"""Which sample of a step lies in which row, and how many rows of which length there are.

Samples lie end to end in rows, so only the ends of rows are wasted; but every shape of a step is a program to compile.
So row lengths come from a ladder, all micro-batches of a step have one shape, and a run keeps to a menu of at most
`MENU_SIZE` shapes, chosen from the lengths of its own samples.

A step's loss and gradient are sums over its samples divided by its trained tokens: they do not depend on which sample
lies in which micro-batch. So a step's samples are spread over the rows of all its micro-batches together, and short
ones take fewer micro-batches than were asked for. A micro-batch never has more tokens than `batch_size` samples of the
longest length would: the memory that the configuration may need in any case.
"""

import functools
import heapq
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

# What work is not linear in tokens, in tokens. In a row of EQUAL_ATTENTION_LENGTH, attention costs as much as all else
# (4 N / (width x layers) for N parameters: 61k for Llama 8B, 37k for 1B). Reading and dequantising all weights, once
# for each micro-batch, costs about MICRO_BATCH_TOKENS. Both only have to say which of two layouts is cheaper.
EQUAL_ATTENTION_LENGTH = 40_000
MICRO_BATCH_TOKENS = 256

MENU_SIZE = 8
WORTH_A_SHAPE = 0.005  # of all work: what a shape must save, because compiling it costs some seconds


class Shape(NamedTuple):
    """The shape [A, R, L] of a step's arrays: A micro-batches of R rows of L tokens."""

    micro_batches: int
    rows: int
    length: int

    @property
    def all_rows(self) -> int:
        return self.micro_batches * self.rows

    @property
    def work(self) -> float:
        """Estimated cost, in tokens of a very short row."""
        tokens = self.rows * self.length
        return self.micro_batches * (tokens * (1 + self.length / EQUAL_ATTENTION_LENGTH) + MICRO_BATCH_TOKENS)


class Limits(NamedTuple):
    """What the configuration and the dataset allow: A, R and the longest sample."""

    micro_batches: int
    rows: int
    longest: int

    @property
    def largest(self) -> Shape:
        """Holds every step: a row for each sample."""
        return Shape(self.micro_batches, self.rows, bucket(self.longest))


def bucket(length: int) -> int:
    """The shortest row length of the ladder that holds `length`: multiples of 64, and eight steps to an octave."""
    step = max(64, 2 ** ((length - 1).bit_length() - 4))
    return -(-length // step) * step


def spread(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """The samples (as positions in `lengths`) of each row, the rows about equally full: the longest sample first, each
    into the row that has most room left."""
    filled = [(0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for sample in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        used, row = filled[0]
        heapq.heapreplace(filled, (used + lengths[sample], row))
        members[row].append(sample)
    return members


def needed_length(lengths: Sequence[int], rows: int) -> int:
    """The row length that these samples need when they are spread over so many rows."""
    return max(sum(lengths[sample] for sample in row) for row in spread(lengths, rows))


def best_shape(lengths: Sequence[int], limits: Limits) -> Shape:
    """The cheapest shape for a step of samples with these lengths, were every shape free."""
    counts = itertools.product(range(1, limits.micro_batches + 1), range(1, limits.rows + 1))
    needed = functools.cache(functools.partial(needed_length, tuple(lengths)))
    shapes = (Shape(a, r, bucket(needed(min(a * r, len(lengths))))) for a, r in counts)
    room = limits.largest.rows * limits.largest.length
    return min(
        (shape for shape in shapes if shape.rows * shape.length <= room),
        key=lambda shape: (shape.work, shape),
    )


def cheapest_fit(lengths: Sequence[int], menu: Iterable[Shape]) -> Shape:
    """The shape of the menu that holds these samples with the least work."""
    return min(
        (shape for shape in menu if needed_length(lengths, shape.all_rows) <= shape.length),
        key=lambda shape: (shape.work, shape),
    )


def shape_menu(steps: Sequence[Sequence[int]], limits: Limits) -> tuple[Shape, ...]:
    """The few shapes that a run uses, from the lengths of a number of its steps.

    Starts from the best shape of every step, and takes away the one without which the whole work grows least: until
    no more than `MENU_SIZE` are left, and each of them is worth compiling. The shape that holds everything stays.
    """
    largest = limits.largest
    menu = [*sorted({best_shape(lengths, limits) for lengths in steps} - {largest}), largest]
    row_counts = sorted({shape.all_rows for shape in menu})
    needed = {rows: np.array([needed_length(lengths, rows) for lengths in steps]) for rows in row_counts}
    columns = [np.where(needed[shape.all_rows] <= shape.length, shape.work, np.inf) for shape in menu]
    work = np.stack(columns, axis=1)  # [step, shape], infinite where the step does not fit
    while len(menu) > 1:
        order = np.argsort(work, axis=1, kind="stable")
        best, second = np.take_along_axis(work, order[:, :2], axis=1).T
        growth = np.bincount(order[:, 0], weights=second - best, minlength=len(menu))
        loser = int(np.argmin(growth[:-1]))
        if len(menu) <= MENU_SIZE and growth[loser] > WORTH_A_SHAPE * best.sum():
            break
        del menu[loser]
        work = np.delete(work, loser, axis=1)
    return tuple(menu)
