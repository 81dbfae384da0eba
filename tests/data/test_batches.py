"""Batches hold exactly the samples that were asked for, whole and apart from each other, in few shapes; and the order
is reproducible and can be taken up anywhere."""

import itertools
import json

import numpy as np
import pytest

from jaxtune.data.batches import BatchStream, epoch_order, lay_out
from jaxtune.data.layout import (
    MENU_SIZE,
    Limits,
    Shape,
    best_shape,
    bucket,
    cheapest_fit,
    needed_length,
    shape_menu,
    spread,
)
from jaxtune.data.sample import Sample
from jaxtune.errors import DatasetError, OptionError


def sample(length: int, first_token: int = 1, untrained: int = 0) -> Sample:
    ids = np.arange(first_token, first_token + length, dtype=np.int32)
    labels = ids.copy()
    labels[:untrained] = -100
    return Sample(ids, labels)


def ragged(count: int, seed: int = 0, low: int = 2, high: int = 300) -> list[Sample]:
    """Samples that no two share a token, so that every token says which sample it is of."""
    lengths = np.random.default_rng(seed).integers(low, high, count).tolist()
    return [
        sample(length, first_token=1 + 1000 * n, untrained=length // 3) for n, length in enumerate(lengths)
    ]


def samples_in(batch) -> list[tuple[list[int], list[int], list[int]]]:
    """(tokens, shifted labels, positions) of every sample of a batch, found by its segment ids."""
    found = []
    arrays = [
        batch[name].reshape(-1, batch["tokens"].shape[-1]) for name in ("tokens", "labels", "positions")
    ]
    for row, segments in enumerate(batch["segment_ids"].reshape(-1, batch["tokens"].shape[-1])):
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert (np.diff(places) == 1).all(), "a sample lies in one piece"
            found.append(tuple(array[row, places].tolist() for array in arrays))
    return found


class TestArrays:
    def test_samples_lie_end_to_end(self):
        batch = lay_out([sample(3, 10, untrained=1), sample(2, 20)], Shape(1, 1, 8))
        assert batch["tokens"].tolist() == [[[10, 11, 12, 20, 21, 0, 0, 0]]]
        assert batch["segment_ids"].tolist() == [[[1, 1, 1, 2, 2, 0, 0, 0]]]
        assert batch["positions"].tolist() == [[[0, 1, 2, 0, 1, 0, 0, 0]]]
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}

    def test_labels_are_the_next_token_of_the_same_sample(self):
        batch = lay_out([sample(3, 10, untrained=1), sample(2, 20)], Shape(1, 1, 8))
        assert batch["labels"].tolist() == [[[11, 12, -100, 21, -100, -100, -100, -100]]]

    def test_an_untrained_token_is_no_label(self):
        batch = lay_out([sample(4, 10, untrained=2)], Shape(1, 1, 4))
        assert batch["labels"].tolist() == [[[-100, 12, 13, -100]]]

    def test_rows_and_micro_batches_without_samples_are_padding(self):
        batch = lay_out([sample(3)], Shape(2, 2, 4))
        assert batch["tokens"].shape == (2, 2, 4)
        assert (batch["segment_ids"] > 0).sum() == 3
        assert (batch["labels"] != -100).sum() == 2

    @pytest.mark.parametrize("shape", [Shape(1, 1, 4096), Shape(1, 3, 1024), Shape(4, 2, 512)])
    def test_every_sample_is_whole_whatever_the_shape(self, shape):
        samples = ragged(8)
        expected = [
            (s.input_ids.tolist(), [*s.labels[1:].tolist(), -100], list(range(len(s.input_ids))))
            for s in samples
        ]
        assert sorted(samples_in(lay_out(samples, shape))) == sorted(expected)


class TestLayout:
    @pytest.mark.parametrize(
        ("length", "expected"),
        [
            (1, 64),
            (64, 64),
            (65, 128),
            (513, 576),
            (1000, 1024),
            (1025, 1152),
            (2048, 2048),
            (2049, 2304),
            (4096, 4096),
        ],
    )
    def test_the_ladder_of_lengths(self, length, expected):
        assert bucket(length) == expected

    def test_the_ladder_wastes_little_and_has_few_steps(self):
        assert all(
            length <= bucket(length) <= max(length * 9 / 8, length + 63) for length in range(1, 20_000)
        )
        assert len({bucket(length) for length in range(1024, 16_385)}) == 1 + 4 * 8

    @pytest.mark.parametrize(
        ("lengths", "batch_size", "accumulation", "expected"),
        [
            ([4096] * 4, 4, 1, (1, 4, 4096)),  # attention makes one row of 16384 dearer
            (
                [2048] * 8,
                2,
                4,
                (4, 2, 2048),
            ),  # more tokens at once than two samples would be against the memory
            ([100, 200, 300, 50], 4, 1, (1, 1, 704)),  # short ones: a row that is longer wastes less
            ([120] * 8, 1, 8, (1, 1, 960)),  # and needs fewer micro-batches than the configuration has
            ([1024], 4, 2, (1, 1, 1024)),  # the rest of an epoch
        ],
    )
    def test_the_best_shape_of_a_step(self, lengths, batch_size, accumulation, expected):
        assert best_shape(lengths, Limits(accumulation, batch_size, longest=max(2048, *lengths))) == expected

    def test_a_micro_batch_takes_no_more_memory_than_the_longest_samples_would(self):
        limits = Limits(4, 2, longest=300)
        for seed in range(20):
            shape = best_shape(np.random.default_rng(seed).integers(2, 300, 8).tolist(), limits)
            assert shape.rows * shape.length <= 2 * bucket(300)
            assert shape.rows <= 2 and shape.micro_batches <= 4

    def test_rows_are_about_equally_full(self):
        lengths = [90, 10, 50, 40, 60, 50]
        rows = spread(lengths, 3)
        assert sorted(itertools.chain(*rows)) == [0, 1, 2, 3, 4, 5]
        assert [sum(lengths[i] for i in row) for row in rows] == [100, 100, 100]

    def test_a_run_has_few_shapes_and_wastes_little(self):
        steps = [
            np.random.default_rng(n).lognormal(5, 0.7, 8).astype(int).clip(20, 2048).tolist()
            for n in range(300)
        ]
        limits = Limits(4, 2, longest=2048)
        menu = shape_menu(steps, limits)
        assert len({best_shape(lengths, limits) for lengths in steps}) > 2 * MENU_SIZE >= 2 * len(menu)
        work = sum(cheapest_fit(lengths, menu).work for lengths in steps)
        assert work < 1.1 * sum(best_shape(lengths, limits).work for lengths in steps)

    def test_a_menu_holds_steps_that_it_has_not_seen(self):
        menu = shape_menu([[64] * 8], Limits(4, 2, longest=500))
        shape = cheapest_fit([500] * 8, menu)
        assert shape == (4, 2, 512) and needed_length([500] * 8, shape.all_rows) <= shape.length

    def test_equal_samples_have_one_shape(self):
        assert shape_menu([[4096] * 4] * 10, Limits(1, 4, longest=4096)) == ((1, 4, 4096),)


class TestOrder:
    def test_a_permutation_that_depends_on_seed_and_epoch_alone(self):
        order = epoch_order(100, seed=3, epoch=1)
        assert sorted(order.tolist()) == list(range(100))
        np.random.default_rng().random()
        assert (order == epoch_order(100, seed=3, epoch=1)).all()
        assert (order != epoch_order(100, seed=3, epoch=2)).any()
        assert (order != epoch_order(100, seed=4, epoch=1)).any()

    def test_the_order_stays_the_same_across_versions(self):
        """A run that was begun with an older numpy, or an older jaxtune, is resumed in its own order."""
        assert epoch_order(8, seed=3407, epoch=1).tolist() == [2, 6, 4, 5, 0, 1, 7, 3]


class TestStream:
    def test_an_epoch_has_every_sample_once(self):
        samples = ragged(21)
        stream = BatchStream(samples, batch_size=2, accumulation=2, seed=1)
        assert stream.steps_per_epoch == 6
        steps = list(itertools.islice(stream, 6))
        seen = [tokens for batch, _ in steps for tokens, _, _ in samples_in(batch)]
        assert sorted(seen) == [s.input_ids.tolist() for s in samples]
        assert [info.num_samples for _, info in steps] == [4, 4, 4, 4, 4, 1]
        assert [info.epoch for _, info in steps] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])

    def test_epochs_differ_in_order_and_not_in_samples(self):
        stream = BatchStream(ragged(8), batch_size=4, seed=1)
        steps = [sorted(samples_in(batch)) for batch, _ in itertools.islice(stream, 4)]
        assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3])
        assert steps[0] not in steps[2:]

    def test_without_shuffling_the_order_is_the_dataset_s(self):
        stream = BatchStream(ragged(6), batch_size=2, shuffle=False)
        firsts = [
            {tokens[0] // 1000 for tokens, _, _ in samples_in(batch)}
            for batch, _ in itertools.islice(stream, 6)
        ]
        assert firsts == [{0, 1}, {2, 3}, {4, 5}] * 2

    def test_every_step_has_a_shape_of_the_menu(self):
        stream = BatchStream(ragged(40), batch_size=2, accumulation=4, seed=0)
        assert {batch["tokens"].shape for batch, _ in itertools.islice(stream, 30)} <= set(stream.shapes)

    def test_what_is_known_about_a_step(self):
        samples = [sample(60, untrained=20), sample(50)]
        batch, info = next(BatchStream(samples, batch_size=2))
        assert (info.num_tokens, info.trained_tokens) == (110, 40 + 49)
        assert info.trained_tokens == (batch["labels"] != -100).sum()
        assert info.efficiency == 110 / batch["tokens"].size

    @pytest.mark.parametrize("done", [0, 1, 2, 3, 4, 7])
    def test_a_restored_stream_goes_on_exactly(self, done):
        samples = ragged(11)
        stream = BatchStream(samples, batch_size=2, accumulation=2, seed=5)
        for _ in range(done):
            next(stream)
        state = json.loads(json.dumps(stream.state()))
        resumed = BatchStream(samples, batch_size=2, accumulation=2, seed=5)
        resumed.restore(state)
        for (batch, info), (again, info_again) in itertools.islice(zip(stream, resumed, strict=False), 5):
            assert info == info_again
            assert all((batch[name] == again[name]).all() for name in batch)

    def test_a_stream_that_drops_the_last_goes_on_from_one_that_did_not(self):
        """Where the other was in what this one leaves out, the epoch is over."""
        samples = ragged(11)
        stream = BatchStream(samples, batch_size=5)
        for _ in range(2):
            next(stream)
        resumed = BatchStream(samples, batch_size=5, drop_last=True)
        assert resumed.steps_per_epoch == 2
        resumed.restore(stream.state())
        assert next(resumed)[1].epoch == 1.5

    @pytest.mark.parametrize(("change", "said"), [({"seed": 6}, "seed=5"), ({"count": 10}, "num_samples=11")])
    def test_a_position_in_other_data_is_refused(self, change, said):
        state = BatchStream(ragged(11), batch_size=2, seed=5).state()
        other = BatchStream(ragged(change.get("count", 11)), batch_size=2, seed=change.get("seed", 5))
        with pytest.raises(DatasetError, match=said):
            other.restore(state)

    def test_fewer_samples_than_a_step_asks_for(self):
        batch, info = next(BatchStream(ragged(3), batch_size=4, accumulation=4))
        assert info.num_samples == 3 and info.epoch == 1
        assert len(samples_in(batch)) == 3

    def test_no_samples_or_an_empty_step_is_an_error(self):
        with pytest.raises(DatasetError, match="no samples"):
            BatchStream([], batch_size=2)
        with pytest.raises(OptionError, match="accumulation is 0"):
            BatchStream(ragged(3), batch_size=2, accumulation=0)
