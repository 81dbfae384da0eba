"""However a step's samples are laid out, its loss and its gradient are the same; and so is the loss that an evaluation
finds."""

import jax
import numpy as np
import pytest

from jaxtune.data.batches import lay_out
from jaxtune.data.layout import Shape
from jaxtune.data.packing import pack
from jaxtune.data.sample import Sample
from jaxtune.training.evaluation import evaluate
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.step import value_and_grad
from tests.kit import tiny
from tests.kit.compare import assert_close, assert_trees_close

LENGTHS = [5, 30, 12, 3, 21, 9, 2, 17]
SHAPES = {
    "8 rows in 1 micro-batch": Shape(1, 8, 64),
    "4 in 2": Shape(2, 4, 64),
    "1 in 8": Shape(8, 1, 64),
    "padded further": Shape(2, 4, 192),
    "packed in one row": Shape(1, 1, 128),
    "packed, without padding": Shape(1, 1, sum(LENGTHS)),
    "packed in two micro-batches": Shape(2, 1, 64),
    "empty rows": Shape(4, 4, 64),
}
PACKED = {"one": (100, Shape(1, 1, 128)), "of two": (60, Shape(1, 2, 64)), "of three": (40, Shape(3, 1, 64))}


def samples():
    rng = np.random.default_rng(0)
    for n, length in enumerate(LENGTHS):
        ids = rng.integers(0, 128, length).astype(np.int32)
        labels = np.where(np.arange(length) < n % 3, -100, ids).astype(np.int32)
        yield Sample(ids, labels)


@pytest.fixture(scope="module")
def case():
    model = tiny.model(windows=(None, 8))
    return model, tiny.params(model), tiny.lora(model)


@pytest.fixture(scope="module")
def of_shape(case):
    model, params, lora = case
    function = jax.jit(
        lambda batch: value_and_grad(unwatched(next_token_loss(model)), lora, params, batch)[:2]
    )
    return lambda shape, items=None: function(lay_out(items or list(samples()), shape))


@pytest.fixture(scope="module")
def expected(of_shape):
    return of_shape(SHAPES["1 in 8"])


@pytest.mark.parametrize("name", SHAPES)
def test_a_step(of_shape, expected, name):
    loss, gradient = of_shape(SHAPES[name])
    assert_close(loss, expected[0], 1e-6)
    assert_trees_close(gradient, expected[1], 1e-5)


@pytest.mark.parametrize("name", PACKED)
def test_a_step_of_packed_rows(of_shape, expected, name):
    max_length, shape = PACKED[name]
    rows = pack(list(samples()), max_length, "bfd")
    assert len(rows) == shape.all_rows
    loss, gradient = of_shape(shape, rows)
    assert_close(loss, expected[0], 1e-6)
    assert_trees_close(gradient, expected[1], 1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_an_evaluation(case, expected, batch_size):
    model, params, lora = case
    for items in (list(samples()), pack(list(samples()), 40, "bfd")):
        found = evaluate(model, params, lora, items, batch_size)["eval_loss"]
        assert_close(np.float32(found), expected[0], 1e-6)
