"""Packed rows hold all tokens once, as TRL packs them, and no sample sees another there."""

import itertools

import datasets
import numpy as np
import pytest
import trl

from jaxtune.data.batches import BatchStream
from jaxtune.data.packing import STRATEGIES, pack
from jaxtune.data.sample import Sample

MAX_LENGTH = 64


def ragged(count: int = 200, longest: int = MAX_LENGTH, seed: int = 0) -> list[Sample]:
    """Samples that no two share a token, every third token a context."""
    lengths = np.random.default_rng(seed).integers(2, longest + 1, count)
    ids = [np.arange(1 + 1000 * n, 1 + 1000 * n + length, dtype=np.int32) for n, length in enumerate(lengths)]
    return [
        Sample(each, np.where(np.arange(len(each)) % 3 == 1, -100, each).astype(np.int32)) for each in ids
    ]


def tokens_of(rows):
    return [[part.input_ids.tolist() for part in row.parts] for row in rows]


def by_trl(samples, strategy):
    """Its rows, each a list of what it counts as one sequence."""
    dataset = datasets.Dataset.from_dict({"input_ids": [sample.input_ids.tolist() for sample in samples]})
    packed = trl.pack_dataset(dataset, MAX_LENGTH, strategy)
    for row in packed:
        ends = list(itertools.accumulate(row["seq_lengths"], initial=0))
        yield [row["input_ids"][start:end] for start, end in itertools.pairwise(ends)]


@pytest.mark.parametrize(("strategy", "longest"), [("bfd", MAX_LENGTH), ("bfd_split", 5 * MAX_LENGTH)])
@pytest.mark.parametrize("seed", range(3))
def test_best_fit_is_trl_s(strategy, longest, seed):
    samples = ragged(longest=longest, seed=seed)
    assert tokens_of(pack(samples, MAX_LENGTH, strategy)) == list(by_trl(samples, strategy))


def test_wrapped_rows_hold_the_tokens_of_trl_s():
    samples = ragged(longest=5 * MAX_LENGTH)
    dataset = datasets.Dataset.from_dict({"input_ids": [sample.input_ids.tolist() for sample in samples]})
    expected = trl.pack_dataset(dataset, MAX_LENGTH, "wrapped")["input_ids"]
    rows = tokens_of(pack(samples, MAX_LENGTH, "wrapped"))
    assert [[token for part in row for token in part] for row in rows] == list(expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_lies_in_one_row_and_rows_are_nearly_full(strategy):
    samples = ragged(2000, longest=MAX_LENGTH if strategy == "bfd" else 300)
    rows = pack(samples, MAX_LENGTH, strategy)
    tokens = [token for row in tokens_of(rows) for part in row for token in part]
    assert sorted(tokens) == [token for sample in samples for token in sample.input_ids.tolist()]
    assert max(row.num_tokens for row in rows) == MAX_LENGTH
    assert sum(row.num_tokens for row in rows) / (MAX_LENGTH * len(rows)) > 0.97


def labels_of(items):
    """All that a stream of these asks to be predicted, each with the token that stands before it."""
    stream = BatchStream(items, batch_size=4, accumulation=2)
    pairs = []
    for batch, _ in itertools.islice(stream, stream.steps_per_epoch):
        trained = batch["labels"] != -100
        pairs += zip(batch["tokens"][trained].tolist(), batch["labels"][trained].tolist(), strict=True)
    return sorted(pairs)


def test_what_is_trained_on_is_the_same():
    samples = ragged()
    assert labels_of(pack(samples, MAX_LENGTH, "bfd")) == labels_of(samples)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_but_for_the_first_token_after_a_cut(strategy):
    samples = ragged(longest=5 * MAX_LENGTH)
    rows = pack(samples, MAX_LENGTH, strategy)
    begins = {part.input_ids[0] for row in rows for part in row.parts}
    assert labels_of(rows) == [pair for pair in labels_of(samples) if pair[1] not in begins]


def test_the_parts_of_a_row_are_segments_of_their_own():
    rows = pack(ragged(), MAX_LENGTH, "bfd")
    row = next(row for row in rows if len(row.parts) > 2)
    batch, info = next(BatchStream([row], batch_size=1))
    lengths = [part.num_tokens for part in row.parts]
    padding = batch["tokens"].size - sum(lengths)
    segments = np.repeat([*range(1, 1 + len(lengths)), 0], [*lengths, padding])
    assert batch["segment_ids"].reshape(-1).tolist() == segments.tolist()
    positions = np.concatenate([*map(np.arange, lengths), np.zeros(padding, int)])
    assert batch["positions"].reshape(-1).tolist() == positions.tolist()
    assert batch["piece_lengths"].reshape(-1)[: len(lengths)].tolist() == lengths
    assert info.sample_ids == row.sample_ids


def test_rows_stay_together_and_fill_the_arrays():
    """A row of max_length tokens needs no longer one."""
    rows = pack(ragged(2000), MAX_LENGTH, "bfd")
    stream = BatchStream(rows, batch_size=4, accumulation=2)
    steps = list(itertools.islice(stream, stream.steps_per_epoch))
    assert stream.steps_per_epoch == -(-len(rows) // 8)
    assert {batch["tokens"].shape[-1] for batch, _ in steps} == {MAX_LENGTH}
    assert np.mean([info.efficiency for _, info in steps]) > 0.97
    together = {frozenset(row.sample_ids) for row in rows}
    for batch, _ in steps[:5]:
        for tokens in batch["tokens"].reshape(-1, MAX_LENGTH):
            assert {token // 1000 for token in tokens.tolist() if token} in together


def test_a_sample_is_named_once_whatever_it_was_cut_into():
    samples = ragged(20, longest=5 * MAX_LENGTH)
    rows = pack(samples, MAX_LENGTH, "wrapped")
    _, info = next(BatchStream(rows, batch_size=len(rows)))
    assert sorted(info.sample_ids) == list(range(20)) and info.num_samples == 20


def test_a_row_without_a_label_is_left_out():
    ids = np.arange(1, 11, dtype=np.int32)
    prompt_fills_a_row = Sample(ids, np.where(ids > 8, ids, -100).astype(np.int32))
    assert tokens_of(pack([prompt_fills_a_row], 5, "wrapped")) == [[[6, 7, 8, 9, 10]]]


def test_a_sample_longer_than_a_row_has_one_of_its_own():
    """Where nobody cut it before it was packed whole."""
    samples = ragged(3, longest=10) + ragged(1, longest=200)
    long = max(sample.num_tokens for sample in samples)
    assert [len(row.parts) for row in pack(samples, 20, "bfd") if row.num_tokens == long] == [1]


def test_the_fingerprint_is_of_the_rows_too():
    samples = ragged()
    items = [samples, *(pack(samples, length, "bfd") for length in (MAX_LENGTH, 2 * MAX_LENGTH))]
    assert len({BatchStream(each, batch_size=2).fingerprint() for each in items}) == 3
