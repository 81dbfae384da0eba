"""Every family is transformers' model of that name: the same logits for every kind of row, in float32.

One batch per family holds a long sequence, both paddings and packed segments, so that one program serves them all.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel
from jaxtune.models.cache import KVCache
from jaxtune.quant import PackedArray
from tests.kit import families, models
from tests.kit.compare import assert_close, relative_rms

T = 40
ROWS = {
    "alone": [(0, 40)],
    "right padding": [(0, 23)],
    "left padding": [(17, 23)],
    "packed": [(0, 12), (12, 23), (35, 5)],
}
"""(start, length) of each sequence in its row."""


class Batch(NamedTuple):
    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


@functools.cache
def batch() -> Batch:
    rng = np.random.default_rng(0)
    made = Batch(*(np.zeros((len(ROWS), T), np.int32) for _ in Batch._fields))
    for row, sequences in enumerate(ROWS.values()):
        for segment, (start, length) in enumerate(sequences, 1):
            here = row, slice(start, start + length)
            made.tokens[here] = rng.integers(5, models.VOCAB, length)
            made.segments[here], made.positions[here] = segment, np.arange(length)
    return made


@pytest.fixture(scope="module", params=families.CASES)
def both(request, tmp_path_factory):
    theirs = families.random_model(request.param)
    folder = models.save(theirs, tmp_path_factory.mktemp("family") / "model")
    ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False, max_seq_length=T)
    return ours, theirs


@pytest.fixture(scope="module")
def logits(both):
    ours, _ = both
    tokens, segments, positions = batch()
    return np.asarray(ours.apply(ours.params, None, tokens, segments_BT=segments, positions_BT=positions))


@pytest.mark.parametrize("row", ROWS)
def test_logits(both, logits, row):
    _, theirs = both
    n = [*ROWS].index(row)
    for start, length in ROWS[row]:
        ids = batch().tokens[n, start : start + length]
        with torch.no_grad():
            expected = theirs(torch.from_numpy(ids[None]).long()).logits[0].numpy()
        assert_close(logits[n, start : start + length], expected, 1e-5, f"{length} tokens from {start}")


# Compiled in half the time, and run once.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def quickly(model, params, tokens, segments, positions):
    return model.apply(params, None, tokens, segments_BT=segments, positions_BT=positions)


def dequantize_all(params):
    is_packed = lambda leaf: isinstance(leaf, PackedArray)
    return jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, params, is_leaf=is_packed)


@pytest.mark.parametrize("both", families.EACH.values(), indirect=True)
def test_in_4_bits_it_computes_what_its_values_say(both, logits):
    """Packed while it loads, whatever the widths: the logits of the values that its packed weights stand for."""
    ours, _ = both
    packed, _ = FastLanguageModel.from_pretrained(ours.name_or_path, dtype="float32", max_seq_length=T)
    tokens, segments, positions = batch()
    found = quickly(packed.causal_lm, packed.params, *batch())
    values = jax.jit(dequantize_all)(packed.params)
    expected = ours.apply(values, None, tokens, segments_BT=segments, positions_BT=positions)
    real = segments > 0
    assert_close(found[real], expected[real], 1e-5)
    assert relative_rms(expected[real], logits[real]) > 1e-2, "it must be packed to show anything"


def test_one_token_at_a_time_equals_one_pass(both, logits):
    """Through the cache, for every row of the batch at once, padding and packing included."""
    ours, _ = both
    model, real = ours.causal_lm, batch().segments > 0

    @jax.jit
    def one_by_one(params):
        def step(cache, column):
            tokens, segments, positions = (x[:, None] for x in column)
            hidden, cache = model.hidden(
                params, None, tokens, segments_BT=segments, positions_BT=positions, cache=cache
            )
            return cache, model.logits(params, hidden[:, 0])

        empty = KVCache.empty(model.config, len(ROWS), T, jnp.float32)
        return jax.lax.scan(step, empty, tuple(jnp.asarray(x.T) for x in batch()))[1].swapaxes(0, 1)

    assert_close(np.asarray(one_by_one(ours.params))[real], logits[real], 1e-5)
