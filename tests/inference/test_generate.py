"""Cached generation is transformers' generation: greedy token for token, temperature in distribution."""

import jax
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel
from jaxtune.errors import OptionError
from tests.kit import models

NEW = 64


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    theirs = models.random_llama()
    folder = models.save(theirs, tmp_path_factory.mktemp("generate") / "model")
    return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)[0], theirs


@pytest.fixture(scope="module")
def prompts():
    """Ragged, padded on the left."""
    rng = np.random.default_rng(0)
    ids, mask = np.full((3, 12), 2), np.zeros((3, 12), int)
    for row, n in enumerate([12, 5, 1]):
        ids[row, 12 - n :], mask[row, 12 - n :] = rng.integers(5, models.VOCAB, n), 1
    return ids, mask


def test_greedy_equals_transformers_for_64_tokens(both, prompts):
    ours, theirs = both
    ids, mask = prompts
    expected = theirs.generate(
        torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), max_new_tokens=NEW, do_sample=False
    ).numpy()
    assert expected.shape[1] == 12 + NEW, (
        "the reference must not stop early, or this compares less than it says"
    )
    np.testing.assert_array_equal(ours.generate(ids, mask, max_new_tokens=NEW), expected)


def test_cache_equals_one_pass(both, prompts):
    """Every greedy token is the likeliest of a pass over all that came before it."""
    ours, _ = both
    ids, mask = prompts
    out = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    whole_mask = np.concatenate([mask, np.ones((3, NEW), int)], 1).astype(np.int32)
    logits = ours.apply(ours.params, None, out, segments_BT=whole_mask)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, 11:-1], out[:, 12:])


def test_stops_at_eos_and_pads(both, prompts):
    ours, _ = both
    ids, mask = prompts
    free = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    stop = int(free[0, 12 + 9])
    out = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=stop, pad_token_id=2)
    for row, line in enumerate(out):
        new = free[row, 12:].tolist()
        end = new.index(stop) + 1 if stop in new else NEW
        np.testing.assert_array_equal(line[12 : 12 + end], new[:end])
        assert (line[12 + end :] == 2).all()


def test_temperature_samples_from_the_softmax(both):
    ours, _ = both
    prompt = np.array([[7, 8, 9]])
    many = np.repeat(prompt, 4096, axis=0)
    first = ours.generate(many, max_new_tokens=1, do_sample=True, temperature=2.0, seed=1)[:, -1]
    p = np.asarray(jax.nn.softmax(ours.apply(ours.params, None, prompt)[0, -1] / 2.0))
    counts = np.bincount(first, minlength=p.size)
    likely = p * 4096 > 20
    deviations = (counts - 4096 * p)[likely] / np.sqrt(4096 * p * (1 - p))[likely]
    assert likely.sum() > 5
    assert np.abs(deviations).max() < 5


def test_seeds_decide(both, prompts):
    ours, _ = both
    ids, mask = prompts
    one, same, other = (
        ours.generate(ids, mask, max_new_tokens=16, do_sample=True, seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([[]], {}),
        ([[1, 99999]], {}),
        ([[1]], {"max_new_tokens": 0}),
        ([[1]], {"do_sample": True, "temperature": 0.0}),
    ],
    ids=["no prompts", "empty prompt", "id outside the vocabulary", "no new tokens", "temperature 0"],
)
def test_bad_input(both, prompt, options):
    with pytest.raises(OptionError, match="what to do"):
        both[0].generate(prompt, **{"max_new_tokens": 4, **options})
