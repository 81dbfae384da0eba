"""Cached generation is transformers' generation: greedy token for token, temperature in distribution."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel, LanguageModel
from jaxtune.errors import OptionError
from jaxtune.inference.generate import _generate
from tests.kit import models, tiny

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


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_mask_padding_is_not_part_of_a_prompt(both, prompts, side):
    ours, _ = both
    ids, mask = prompts
    assert ours.tokenizer.pad_token_id == 2 != ours.tokenizer.eos_token_id
    if side == "right":
        ids, mask = (
            np.stack([np.roll(row, -(12 - n)) for row, n in zip(x, [12, 5, 1], strict=True)])
            for x in (ids, mask)
        )
    padded = np.where(mask > 0, ids, 2)
    expected = ours.generate(padded, mask, max_new_tokens=8)
    np.testing.assert_array_equal(ours.generate(padded, max_new_tokens=8), expected)


def test_a_temperature_without_sampling_is_mentioned(both, prompts, caplog):
    both[0].generate(*prompts, max_new_tokens=8, temperature=2.0)
    assert "temperature=2.0 has no effect" in caplog.text


def test_cache_equals_one_pass(both, prompts):
    """Every greedy token is the likeliest of a pass over all that came before it."""
    ours, _ = both
    ids, mask = prompts
    out = ours.generate(ids, mask, max_new_tokens=NEW, eos_token_id=-1)
    whole_mask = np.concatenate([mask, np.ones((3, NEW), int)], 1).astype(np.int32)
    logits = ours.apply(ours.params, None, out, segments_BT=whole_mask)
    np.testing.assert_array_equal(np.asarray(logits).argmax(-1)[:, 11:-1], out[:, 12:])


def test_with_an_adapter_on_packed_weights_and_long_prompts():
    """Two buckets of prompt, an adapter that is awake: every token is still the likeliest of one pass."""
    causal_lm = tiny.model(tie_word_embeddings=True)
    ours = LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm))
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 128, n).tolist() for n in (100, 3)]
    out = ours.generate(prompts, max_new_tokens=70)
    base = LanguageModel(causal_lm, ours.params).generate(prompts, max_new_tokens=70)
    assert not np.array_equal(out, base), "the adapter must matter"
    for row, prompt in zip(out, prompts, strict=True):
        line = row[None, : len(prompt) + 70]
        logits = np.asarray(ours.apply(ours.params, ours.lora, line))
        np.testing.assert_array_equal(logits.argmax(-1)[0, len(prompt) - 1 : -1], line[0, len(prompt) :])


def test_a_single_prompt_and_a_tokenizers_output(both):
    ours, _ = both
    expected = ours.generate([[7, 8, 9]], max_new_tokens=4)
    np.testing.assert_array_equal(ours.generate([7, 8, 9], max_new_tokens=4), expected)
    np.testing.assert_array_equal(ours.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4), expected)
    given = {"input_ids": np.array([[7, 8, 9]]), "attention_mask": np.ones((1, 3), int)}
    np.testing.assert_array_equal(ours.generate(**given, max_new_tokens=4, use_cache=True), expected)


def test_few_programs_serve_many_lengths(both):
    ours, _ = both
    _generate.clear_cache()
    for prompt, new in (([[1, 2]], 3), ([[1, 2, 3]], 9), ([[5] * 40], 30)):
        ours.generate(prompt, max_new_tokens=new)
    assert _generate._cache_size() == 1


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


def test_stops_where_the_tokenizer_now_ends(both):
    """A chat template gives the tokenizer another end of turn after the model was loaded: the model follows."""
    ours = dataclasses.replace(both[0], tokenizer=models.fresh_tokenizer())
    free = ours.generate([7, 8, 9], max_new_tokens=40, eos_token_id=-1)[0, 3:].tolist()
    token = next(token for token in free if token != free[0] and token < len(ours.tokenizer))
    ours.tokenizer.eos_token = ours.tokenizer.convert_ids_to_tokens(token)
    stopped = ours.generate([7, 8, 9], max_new_tokens=40)[0, 3:].tolist()
    assert stopped == free[: free.index(token) + 1]


def test_temperature_samples_from_the_softmax(both):
    ours, _ = both
    prompt = np.array([[7, 8, 9]])
    many = np.repeat(prompt, 4096, axis=0)
    first = ours.generate(many, max_new_tokens=1, do_sample=True, temperature=0.5, seed=1)[:, -1]
    p = np.asarray(jax.nn.softmax(ours.apply(ours.params, None, prompt)[0, -1] / 0.5))
    counts = np.bincount(first, minlength=p.size)
    likely = p * 4096 > 20
    deviations = (counts - 4096 * p)[likely] / np.sqrt(4096 * p * (1 - p))[likely]
    assert likely.sum() > 5
    assert np.abs(deviations).max() < 5


def test_seeds_decide(both, prompts):
    ours, _ = both
    ids, mask = prompts
    one, same, other, anew, again = (
        ours.generate(ids, mask, max_new_tokens=16, do_sample=True, seed=seed)
        for seed in (1, 1, 2, None, None)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.array_equal(anew, again)


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([[]], {}),
        ([[1, 99999]], {}),
        ("hello", {}),
        ([[1, 2]], {"attention_mask": [[1]]}),
        ([[1]], {"top_p": 0.9}),
        ([[1]], {"max_new_tokens": 0}),
        ([[1]], {"do_sample": True, "temperature": 0.0}),
    ],
    ids=[
        "no prompts",
        "empty prompt",
        "id outside the vocabulary",
        "text",
        "mask",
        "top_p",
        "no new tokens",
        "temperature 0",
    ],
)
def test_bad_input(both, prompt, options):
    with pytest.raises(OptionError, match="what to do"):
        both[0].generate(prompt, **{"max_new_tokens": 4, **options})
