"""The steps of a run as arrays: `BatchStream` goes through the samples epoch by epoch in a reproducible order, lays
those of each step end to end in rows (see layout.py), and can be put back to where it was."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.layout import Limits, Shape, cheapest_fit, shape_menu, spread
from jaxtune.data.pieces import Packing, piece_lengths
from jaxtune.data.sample import IGNORED, Item, PackedRow, Sample
from jaxtune.errors import DatasetError, OptionError

type Batch = dict[str, np.ndarray]
"""`tokens`, `labels`, `segment_ids`, `positions`: int32 [A, R, L], micro-batches of rows of tokens. `labels` holds the
token to predict at each place (the sample's next one), -100 where there is none; `segment_ids` counts a row's samples
from 1, 0 is padding; `positions` starts again with every sample. `piece_lengths` [A, G, M] holds the lengths of
samples and padding as they lie in the rows (see pieces.py), or [A, R, 1] each row's only sample."""

# The shapes are chosen by looking at so many steps, or at fewer that have so many samples: that takes about 0.2 s.
MENU_STEPS, MENU_SAMPLES = 512, 4096


class StepInfo(NamedTuple):
    """What is worth knowing about a batch besides its arrays."""

    epoch: float  # epochs done once this step is
    num_samples: int
    sample_ids: tuple[int, ...]  # places among the samples, before they were packed
    num_tokens: int  # of samples, without padding
    trained_tokens: int  # those with a label
    efficiency: float  # num_tokens by the places that the arrays have


class BatchStream:
    """Endless `(Batch, StepInfo)` pairs. A step has the next `batch_size * accumulation` samples of its epoch (a packed
    row counts as one). The last step of an epoch has what is left, as in the Hugging Face Trainer; with `drop_last`,
    only as many as make whole batches."""

    def __init__(
        self,
        samples: Sequence[Item],
        batch_size: int,
        accumulation: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ):
        for name, value in {"batch_size": batch_size, "accumulation": accumulation}.items():
            if value < 1:
                raise OptionError(
                    f"{name} is {value}.", expected="at least 1.", fix=f"Pass {name}=1 or more."
                )
        if not samples:
            raise DatasetError(
                "there are no samples to make batches of.",
                expected="at least one sample.",
                fix="Check what `prepare` or a filter has left of the dataset.",
            )
        self._samples = samples
        self._lengths = [sample.num_tokens for sample in samples]
        self._seed, self._shuffle = seed, shuffle
        self._epoch_size = len(samples) - (len(samples) % batch_size if drop_last else 0)
        if not self._epoch_size:
            raise DatasetError(
                f"there are {len(samples)} samples (or packed rows), fewer than a batch of {batch_size}.",
                expected="at least one whole batch, as dataloader_drop_last=True leaves out what is less.",
                fix="Lower per_device_train_batch_size, or leave dataloader_drop_last out.",
            )
        self._step_size = min(batch_size * accumulation, self._epoch_size)
        self._epoch, self._cursor = 0, 0
        self._order = self._order_of(0)
        limits = Limits(accumulation, batch_size, max(self._lengths))
        steps = list(islice(self._steps(), min(MENU_STEPS, max(16, MENU_SAMPLES // self._step_size))))
        lengths_of_steps = [[self._lengths[member] for member in members] for members in steps]
        self.shapes: tuple[Shape, ...] = shape_menu(lengths_of_steps, limits)
        self._packings: dict[Shape, Packing | None] = dict.fromkeys(self.shapes)
        for members, lengths in zip(steps, lengths_of_steps, strict=True):
            shape = cheapest_fit(lengths, self.shapes)
            rows = rows_of([samples[member] for member in members], shape)
            self._packings[shape] = Packing.of_step(_lengths_in(rows), shape, self._packings[shape])

    @property
    def steps_per_epoch(self) -> int:
        return -(-self._epoch_size // self._step_size)

    def __iter__(self) -> Iterator[tuple[Batch, StepInfo]]:
        return self

    def __next__(self) -> tuple[Batch, StepInfo]:
        members = self._order[self._cursor : self._cursor + self._step_size].tolist()
        samples = [self._samples[member] for member in members]
        shape = cheapest_fit([self._lengths[member] for member in members], self.shapes)
        batch = lay_out(samples, shape, self._packings[shape])
        self._cursor += len(members)
        steps = -(-self._cursor // self._step_size)
        info = StepInfo(
            epoch=self._epoch + steps / self.steps_per_epoch,
            num_samples=len(sample_ids := self._sample_ids(members)),
            sample_ids=sample_ids,
            num_tokens=(num_tokens := sum(self._lengths[member] for member in members)),
            trained_tokens=sum(sample.num_trained for sample in samples),
            efficiency=num_tokens / batch["tokens"].size,
        )
        if self._cursor == self._epoch_size:
            self._go_to(self._epoch + 1, 0)
        return batch, info

    def fingerprint(self) -> str:
        """Of all samples: their tokens, which are trained on, and which lie together."""
        content = hashlib.blake2b(digest_size=8)
        for sample in self._samples:
            if isinstance(sample, PackedRow):
                content.update(np.array([part.num_tokens for part in sample.parts], np.int32))
            for part in sample.parts:
                content.update(np.ascontiguousarray(part.input_ids, np.int32))
                content.update(np.ascontiguousarray(part.labels, np.int32))
        return content.hexdigest()

    def state(self) -> dict[str, Any]:
        """Where the stream is, for JSON: the batch that comes next is the first that a restored stream yields."""
        return {
            "epoch": self._epoch,
            "cursor": self._cursor,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "num_samples": len(self._samples),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from `state`, which has to be of the same samples in the same order."""
        for name in ("num_samples", "seed", "shuffle"):
            if state[name] != self.state()[name]:
                raise DatasetError(
                    f"the data position was saved with {name}={state[name]}, and now it is {self.state()[name]}.",
                    expected="the dataset, its preparation and packing, and the seed of the run that is resumed.",
                    fix="Restore them, or start a new run without resume_from_checkpoint.",
                )
        # With drop_last, an epoch may be shorter than the one that was being gone through.
        at_end = state["cursor"] >= self._epoch_size
        self._go_to(*((state["epoch"] + 1, 0) if at_end else (state["epoch"], state["cursor"])))

    def _go_to(self, epoch: int, cursor: int) -> None:
        self._epoch, self._cursor, self._order = epoch, cursor, self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        size = len(self._samples)
        order = epoch_order(size, self._seed, epoch) if self._shuffle else np.arange(size)
        return order[: self._epoch_size]

    def _steps(self) -> Iterator[list[int]]:
        """The members of each step, epoch after epoch. (The menu of shapes follows from these, and so is the same in a
        resumed run.)"""
        for epoch in count():
            order = self._order_of(epoch).tolist()
            for start in range(0, len(order), self._step_size):
                yield order[start : start + self._step_size]

    def _sample_ids(self, members: Sequence[int]) -> tuple[int, ...]:
        ids: dict[int, None] = {}  # each once, in order
        for member in members:
            item = self._samples[member]
            ids |= dict.fromkeys(item.sample_ids if isinstance(item, PackedRow) else (member,))
        return tuple(ids)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples that depends on seed and epoch alone: not on other random numbers drawn, and not on
    numpy's version, which promises stable raw bits but not stable shuffles."""
    bits = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


def rows_of(items: Sequence[Item], shape: Shape) -> list[list[Sample]]:
    """The samples of each row of a batch of this shape, one after the other. What is packed stays together."""
    spread_items = spread([item.num_tokens for item in items], shape.all_rows)
    return [[part for member in row for part in items[member].parts] for row in spread_items]


def lay_out(items: Sequence[Item], shape: Shape, packing: Packing | None = None) -> Batch:
    """The samples end to end in the rows of a batch of this shape, none cut; `packing` is what other steps need."""
    batch: Batch = {
        name: np.zeros(shape, dtype=np.int32) for name in ("tokens", "labels", "segment_ids", "positions")
    }
    batch["labels"].fill(IGNORED)
    arrays = {name: array.reshape(shape.all_rows, shape.length) for name, array in batch.items()}
    rows = rows_of(items, shape)
    for row, samples in enumerate(rows):
        start = 0
        for segment, sample in enumerate(samples, start=1):
            end = start + sample.num_tokens
            arrays["tokens"][row, start:end] = sample.input_ids
            arrays["labels"][row, start : end - 1] = sample.labels[1:]
            arrays["segment_ids"][row, start:end] = segment
            arrays["positions"][row, start:end] = np.arange(end - start)
            start = end
    return batch | {"piece_lengths": piece_lengths(_lengths_in(rows), shape, packing)}


def _lengths_in(rows: Sequence[Sequence[Sample]]) -> list[list[int]]:
    return [[sample.num_tokens for sample in row] for row in rows]
