"""Pieces cover a micro-batch's tokens in their order, each within what their array's shape reserves."""

import numpy as np
import pytest

from jaxtune.data.batches import BatchStream, lay_out
from jaxtune.data.layout import Shape, bucket
from jaxtune.data.pieces import Packing, piece_lengths
from tests.data.test_batches import ragged, sample

PACKED = [
    (ragged(5), Shape(1, 2, 1024)),
    (ragged(30), Shape(2, 3, 1024)),
    (ragged(64, high=5), Shape(1, 1, 320)),
    ([sample(3), sample(2)], Shape(1, 1, 7)),
    ([sample(700), sample(2), sample(2)], Shape(1, 2, 832)),
    ([sample(2), sample(3)], Shape(2, 1, 64 * 7)),
    (ragged(9), Shape(2, 4, 704)),
]


def of_micro_batch(batch, a):
    return [length for length in batch["piece_lengths"][a].reshape(-1).tolist() if length]


@pytest.mark.parametrize(("samples", "shape"), PACKED)
def test_pieces_are_samples_and_padding_end_to_end(samples, shape):
    batch = lay_out(samples, shape, Packing(longest=64, number=0) if shape.micro_batches == 2 else None)
    groups, size = batch["piece_lengths"].shape[1:]
    tokens = shape.rows * shape.length
    assert size >= 2 and tokens % groups == 0
    for a in range(shape.micro_batches):
        pieces = of_micro_batch(batch, a)
        assert sum(pieces) == tokens
        assert max(pieces) <= tokens // groups, "none is longer than what is reserved for one"
        # Each token's segment as pieces have it: a number for each piece, of which padding may have several.
        numbers = np.repeat(np.arange(len(pieces)), pieces)
        rows = np.repeat(np.arange(shape.rows), shape.length)
        segments = batch["segment_ids"][a].reshape(-1)
        for piece in range(len(pieces)):
            inside = numbers == piece
            assert len({*zip(rows[inside].tolist(), segments[inside].tolist(), strict=True)}) == 1
        for row, segment in {*zip(rows.tolist(), segments.tolist(), strict=True)}:
            if segment:
                assert len({*numbers[(rows == row) & (segments == segment)].tolist()}) == 1, "in one piece"


def test_one_sample_a_row_is_no_packing():
    batch = lay_out([sample(5), sample(3), sample(4)], Shape(2, 2, 8))
    assert batch["piece_lengths"].shape == (2, 2, 1)
    assert (
        batch["piece_lengths"].reshape(-1).tolist() == (batch["segment_ids"] > 0).sum(-1).reshape(-1).tolist()
    )


def test_what_is_reserved_is_little_more_than_what_is_there():
    """32 samples of 512 tokens on average, in 5 rows: a row's length for each of them would be 7 times as much."""
    lengths = np.random.default_rng(0).integers(64, 960, 32).tolist()
    rows = [lengths[row::5] for row in range(5)]
    length = bucket(max(map(sum, rows)))
    groups, size = piece_lengths(rows, Shape(1, 5, length)).shape[1:]
    assert size <= 4
    assert 5 * length // groups < 2 * 960


def test_a_shape_is_one_program_all_along():
    """What is reserved is what the whole run needs, not each step's own."""
    stream = BatchStream(ragged(64, high=100), batch_size=8, accumulation=2)
    seen = {}
    for _, (batch, _) in zip(range(24), stream, strict=False):
        seen.setdefault(batch["tokens"].shape, set()).add(batch["piece_lengths"].shape)
    assert all(len(shapes) == 1 for shapes in seen.values())


def test_a_step_that_needs_more_gets_it():
    shape = Shape(1, 1, 640)
    few, many = [[200, 300]], [[10] * 60]
    expected = Packing.of_step(few, shape)
    assert piece_lengths(few, shape, expected).shape == (1, 2, 2)
    assert piece_lengths(many, shape, expected).reshape(-1).tolist().count(10) == 60
    assert piece_lengths([[640]], shape, expected).shape[1] == 1
