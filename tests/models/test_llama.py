"""The Llama decoder is transformers' Llama: the same logits for every kind of row, in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel
from tests.kit import models
from tests.kit.compare import assert_close

VARIANTS = {
    "untied, llama3 rope": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "default rope, no grouping": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "num_key_value_heads": 8,
    },
    "head_dim apart from hidden size": {"head_dim": 32, "num_hidden_layers": 3},
}
LENGTHS = [50, 23, 7]


@pytest.fixture(scope="module", params=VARIANTS)
def both(request, tmp_path_factory):
    theirs = models.random_llama(**VARIANTS[request.param])
    folder = models.save(theirs, tmp_path_factory.mktemp("llama") / "model")
    ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    return ours, theirs


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(0)
    return [rng.integers(5, models.VOCAB, n).astype(np.int32) for n in LENGTHS]


def reference_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids[None].astype(np.int64))).logits[0].numpy()


def padded(sequences, side):
    ids = np.full((len(sequences), max(LENGTHS)), 2, np.int32)
    mask = np.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(0, len(sequence)) if side == "right" else slice(ids.shape[1] - len(sequence), None)
        ids[row, where], mask[row, where] = sequence, 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_ragged_rows(both, sequences, side):
    ours, theirs = both
    ids, mask = padded(sequences, side)
    logits = np.asarray(jax.jit(lambda p: ours.apply(p, None, ids, segments_BT=mask))(ours.params))
    for row, sequence in enumerate(sequences):
        assert_close(logits[row][mask[row] > 0], reference_logits(theirs, sequence), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_treated_as_transformers_treats_it(both, sequences, side):
    """The same padded batch and mask given to both."""
    ours, theirs = both
    ids, mask = padded(sequences, side)
    with torch.no_grad():
        position_ids = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
        expected = theirs(
            torch.from_numpy(ids).long(), attention_mask=torch.from_numpy(mask), position_ids=position_ids
        ).logits.numpy()
    logits = np.asarray(ours.apply(ours.params, None, ids, segments_BT=mask))
    assert_close(logits[mask > 0], expected[mask > 0], 1e-5)


def test_packed_segments_equal_the_sequences_alone(both, sequences):
    ours, theirs = both
    ids = np.concatenate(sequences)[None]
    segments = np.repeat(np.arange(1, 4), LENGTHS)[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in LENGTHS])[None].astype(np.int32)
    logits = ours.apply(ours.params, None, ids, segments_BT=segments, positions_BT=positions)
    expected = np.concatenate([reference_logits(theirs, sequence) for sequence in sequences])
    assert_close(logits[0], expected, 1e-5)


def test_pure_under_jit_grad_and_vmap(both, sequences):
    ours, _ = both
    rows = np.stack([sequences[0], sequences[0][::-1]])
    plain = ours.apply(ours.params, None, rows)
    mapped = jax.vmap(lambda row: ours.apply(ours.params, None, row[None])[0])(rows)
    assert_close(mapped, plain, 1e-5)

    def mean_logit(norm):
        params = {**ours.params, "norm": {"weight": norm}}
        return ours.apply(params, None, rows).mean()

    weight = ours.params["norm"]["weight"]
    direction = jnp.linspace(-1, 1, weight.size)
    slope = (mean_logit(weight + 1e-2 * direction) - mean_logit(weight - 1e-2 * direction)) / 2e-2
    assert_close(jnp.vdot(jax.jit(jax.grad(mean_logit))(weight), direction), slope, 1e-2)


def test_params_are_a_plain_nested_dict(both):
    ours, _ = both

    def only_dicts(tree):
        return isinstance(tree, jax.Array) or (type(tree) is dict and all(map(only_dicts, tree.values())))

    assert only_dicts(ours.params)
