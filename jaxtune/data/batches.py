"""The steps of a run as arrays: `BatchStream` goes through the samples epoch by epoch in a reproducible order, lays
those of each step end to end in rows (see layout.py), and can be put back to where it was."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from jaxtune.data.layout import Limits, Shape, cheapest_fit, shape_menu, spread
from jaxtune.data.pieces import Packing, piece_lengths
from jaxtune.data.sample import IGNORED, Sample
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
    sample_ids: tuple[int, ...]  # places in the dataset that was prepared
    num_tokens: int  # of samples, without padding
    trained_tokens: int  # those with a label
    efficiency: float  # num_tokens by the places that the arrays have


class BatchStream:
    """Endless `(Batch, StepInfo)` pairs. A step has the next `batch_size * accumulation` samples of its epoch; the last
    step of an epoch has what is left, as in the Hugging Face Trainer."""

    def __init__(
        self,
        samples: Sequence[Sample],
        batch_size: int,
        accumulation: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
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
        self._lengths = [len(sample.input_ids) for sample in samples]
        self._seed, self._shuffle = seed, shuffle
        self._step_size = min(batch_size * accumulation, len(samples))
        self._epoch, self._cursor = 0, 0
        self._order = self._order_of(0)
        limits = Limits(accumulation, batch_size, max(self._lengths))
        steps = list(islice(self._step_lengths(), min(MENU_STEPS, max(16, MENU_SAMPLES // self._step_size))))
        self.shapes: tuple[Shape, ...] = shape_menu(steps, limits)
        self._packings: dict[Shape, Packing | None] = dict.fromkeys(self.shapes)
        for lengths in steps:
            shape = cheapest_fit(lengths, self.shapes)
            rows = [[lengths[member] for member in row] for row in spread(lengths, shape.all_rows)]
            self._packings[shape] = Packing.of_step(rows, shape, self._packings[shape])

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self._samples) // self._step_size)

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
            num_samples=len(samples),
            sample_ids=tuple(members),
            num_tokens=(num_tokens := sum(self._lengths[member] for member in members)),
            trained_tokens=sum(sample.num_trained for sample in samples),
            efficiency=num_tokens / batch["tokens"].size,
        )
        if self._cursor == len(self._samples):
            self._go_to(self._epoch + 1, 0)
        return batch, info

    def fingerprint(self) -> str:
        """Of all samples: their tokens, and which are trained on."""
        content = hashlib.blake2b(digest_size=8)
        for sample in self._samples:
            content.update(np.ascontiguousarray(sample.input_ids, np.int32))
            content.update(np.ascontiguousarray(sample.labels, np.int32))
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
                    expected="the dataset, its preparation and the seed of the run that is resumed.",
                    fix="Restore them, or start a new run without resume_from_checkpoint.",
                )
        self._go_to(state["epoch"], state["cursor"])

    def _go_to(self, epoch: int, cursor: int) -> None:
        self._epoch, self._cursor, self._order = epoch, cursor, self._order_of(epoch)

    def _order_of(self, epoch: int) -> np.ndarray:
        size = len(self._samples)
        return epoch_order(size, self._seed, epoch) if self._shuffle else np.arange(size)

    def _step_lengths(self) -> Iterator[list[int]]:
        """The samples' lengths in each step, epoch after epoch. (The menu of shapes follows from these, and so is the
        same in a resumed run.)"""
        for epoch in count():
            order = self._order_of(epoch).tolist()
            for start in range(0, len(order), self._step_size):
                yield [self._lengths[member] for member in order[start : start + self._step_size]]


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the samples that depends on seed and epoch alone: not on other random numbers drawn, and not on
    numpy's version, which promises stable raw bits but not stable shuffles."""
    bits = np.random.Philox(key=[seed % 2**64, epoch]).random_raw(num_samples)
    return np.argsort(bits, kind="stable")


def lay_out(samples: Sequence[Sample], shape: Shape, packing: Packing | None = None) -> Batch:
    """The samples end to end in the rows of a batch of this shape, none cut; `packing` is what other steps need."""
    batch: Batch = {
        name: np.zeros(shape, dtype=np.int32) for name in ("tokens", "labels", "segment_ids", "positions")
    }
    batch["labels"].fill(IGNORED)
    rows = {name: array.reshape(shape.all_rows, shape.length) for name, array in batch.items()}
    rows_of_samples = spread([len(sample.input_ids) for sample in samples], shape.all_rows)
    for row, members in enumerate(rows_of_samples):
        start = 0
        for segment, member in enumerate(members, start=1):
            sample = samples[member]
            end = start + len(sample.input_ids)
            rows["tokens"][row, start:end] = sample.input_ids
            rows["labels"][row, start : end - 1] = sample.labels[1:]
            rows["segment_ids"][row, start:end] = segment
            rows["positions"][row, start:end] = np.arange(end - start)
            start = end
    lengths = [[len(samples[member].input_ids) for member in row] for row in rows_of_samples]
    return batch | {"piece_lengths": piece_lengths(lengths, shape, packing)}
