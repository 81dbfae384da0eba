"""add_new_tokens: the tokenizer and both tables grow, old tokens keep their logits, new rows lie among the trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import FastLanguageModel, add_new_tokens
from jaxtune.errors import AdapterError, OptionError
from tests.kit import models

NEW = ["<think>", "quick fox"]
TOKENS = jnp.arange(12)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    theirs = models.random_llama(tie_word_embeddings=request.param)
    return models.save(theirs, tmp_path_factory.mktemp("new") / "model")


def load(folder):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)


def tables(model):
    return [model.params[name]["weight"] for name in ("embed_tokens", "lm_head") if name in model.params]


@pytest.mark.parametrize("method", ["mean", "interpolation"])
def test_rows_start_where_trained_ones_lie(folder, method):
    model, tokenizer = load(folder)
    used, old = len(tokenizer), tables(model)
    before = model.apply(model.params, None, TOKENS)
    pieces = tokenizer.encode(NEW[1], add_special_tokens=False)
    assert len(pieces) > 1
    add_new_tokens(model, tokenizer, NEW, method=method)

    assert tokenizer.convert_tokens_to_ids(NEW) == [used, used + 1]
    assert tokenizer.encode(f"a{NEW[0]}", add_special_tokens=False)[-1] == used
    assert model.causal_lm.config.vocab_size == max(models.VOCAB, used + 2)
    for was, now in zip(old, tables(model), strict=True):
        np.testing.assert_array_equal(now[:used], was[:used])
        trained = np.asarray(was[:used])
        expected = trained[trained.any(1)].mean(0)  # transformers leaves the pad token's row at zero
        if method == "interpolation":
            expected = 0.5 * expected + 0.5 * np.asarray(was)[pieces].mean(0)
        np.testing.assert_allclose(now[used + 1], expected, atol=1e-6)
    after = model.apply(model.params, None, TOKENS)
    np.testing.assert_allclose(after[..., :used], before[..., :used], rtol=1e-5, atol=1e-5)
    assert model.apply(model.params, None, jnp.array([[used, used + 1]])).shape[-1] == after.shape[-1]


def test_the_grown_model_is_trained_as_any(folder):
    model, tokenizer = load(folder)
    add_new_tokens(model, tokenizer, NEW, pad_to_multiple_of=64)
    assert model.causal_lm.config.vocab_size % 64 == 0
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    tokens = jnp.array([[1, len(tokenizer) - 1, 5]])
    gradient = jax.grad(lambda lora: adapted.apply(adapted.params, lora, tokens)[..., -1].sum())(adapted.lora)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(AdapterError, match="before get_peft_model"):
        add_new_tokens(adapted, tokenizer, ["<more>"])


def test_rows_without_training_do_not_count(folder):
    model, tokenizer = load(folder)
    weight = model.params["embed_tokens"]["weight"].at[:100].set(0)
    model.params = {**model.params, "embed_tokens": {"weight": weight}}
    used = len(tokenizer)
    add_new_tokens(model, tokenizer, NEW)
    expected = np.asarray(weight[100:used]).mean(0)
    np.testing.assert_allclose(model.params["embed_tokens"]["weight"][used], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"new_tokens": ["<|end|>"]}, "'<|end|>', which the tokenizer has already"),
        ({"new_tokens": ["<a>", "<a>"]}, "a token twice"),
        ({"new_tokens": "<a>"}, "a list of strings"),
        ({"new_tokens": ["<a>"], "method": "meam"}, "Did you mean 'mean'"),
        ({"new_tokens": ["<a>"], "method": "interpolation", "interpolation": 2}, "from 0 to 1"),
    ],
)
def test_what_cannot_be_added(folder, options, word):
    model, tokenizer = load(folder)
    size = len(tokenizer)
    with pytest.raises(OptionError) as caught:
        add_new_tokens(model, tokenizer, **options)
    assert word in str(caught.value)
    assert len(tokenizer) == size, "nothing half-done"


def test_nothing_that_loses_them_is_saved(folder, tmp_path):
    model, tokenizer = load(folder)
    add_new_tokens(model, tokenizer, NEW)
    with pytest.raises(OptionError, match="2 added tokens"):
        model.save_pretrained_merged(tmp_path / "merged", tokenizer)
    assert not (tmp_path / "merged").exists()
