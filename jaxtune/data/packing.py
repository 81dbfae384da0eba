"""Packing: which samples lie together in rows of at most `max_length` tokens, so that the rows of a batch are full.

A row counts as one sample of a batch. No token sees another sample, or another part of its own where that was cut:
positions begin anew, and the first token of a part is not trained on, as nothing stands before it.
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxtune.data.sample import PackedRow, Sample


class Part(NamedTuple):
    """Tokens `start` to `end` of a sample."""

    sample: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


type Rows = list[list[Part]]


def best_fit(parts: Iterable[Part], max_length: int) -> Rows:
    """Best-fit decreasing: the longest first, each into the row whose room it fills best; of such rows, the oldest."""
    rows: Rows = []
    rows_by_room: dict[int, deque[list[Part]]] = defaultdict(deque)
    rooms: list[int] = []  # that rows have, ascending
    for part in sorted(parts, key=lambda part: -part.num_tokens):
        at = bisect_left(rooms, part.num_tokens)
        if at < len(rooms):
            room = rooms[at]
            row = rows_by_room[room].popleft()
            if not rows_by_room[room]:
                del rooms[at]
        else:
            room, row = max_length, []
            rows.append(row)
        row.append(part)
        if (left := room - part.num_tokens) > 0:
            if not rows_by_room[left]:
                insort(rooms, left)
            rows_by_room[left].append(row)
    return rows


def best_fit_split(parts: Iterable[Part], max_length: int) -> Rows:
    """The same, of parts of at most `max_length` tokens."""
    return best_fit((piece for part in parts for piece in _cut(part, max_length, max_length)), max_length)


def wrapped(parts: Iterable[Part], max_length: int) -> Rows:
    """One after the other, cut where a row ends: all rows but the last are full."""
    rows: Rows = []
    room = 0
    for part in parts:
        for piece in _cut(part, room, max_length):
            if room == 0:
                rows.append([])
                room = max_length
            rows[-1].append(piece)
            room -= piece.num_tokens
    return rows


def _cut(part: Part, first: int, length: int) -> Iterator[Part]:
    """Pieces of `length` tokens, but for the last and, unless it is 0, the first."""
    start, end = part.start, part.start + (first or length)
    while start < part.end:
        yield Part(part.sample, start, min(end, part.end))
        start, end = end, end + length


STRATEGIES: dict[str, Callable[[Iterable[Part], int], Rows]] = {
    "bfd": best_fit,
    "bfd_split": best_fit_split,
    "wrapped": wrapped,
}
"""By TRL's names. All but "bfd" cut samples, so that these may be longer than a row."""


def pack(samples: Sequence[Sample], max_length: int, strategy: str) -> list[PackedRow]:
    """The samples in rows, without those that have nothing to train on."""
    whole = (Part(index, 0, sample.num_tokens) for index, sample in enumerate(samples))
    rows = (
        PackedRow(
            tuple(samples[part.sample].cut(part.start, part.end) for part in row),
            tuple(part.sample for part in row),
        )
        for row in STRATEGIES[strategy](whole, max_length)
    )
    return [row for row in rows if row.num_trained]
