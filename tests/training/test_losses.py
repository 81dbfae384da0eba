"""The loss sees the logits that the model gives: scaled, capped, and divided by a temperature in that order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.models.layer_loop import Remat
from jaxtune.training.losses import label_nll, label_nll_and_entropy, next_token_loss
from tests.kit import tiny
from tests.kit.compare import assert_close, assert_trees_close


@pytest.fixture(scope="module")
def case():
    """(model, what its losses take)."""
    model = tiny.model(logit_scale=0.5, logit_softcap=0.3, windows=(None,))
    micro = {name: array[0] for name, array in tiny.batch(micro_batches=1).items()}
    return model, (tiny.lora(model), tiny.params(model), micro)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_losses_and_entropies_are_those_of_the_models_logits(case, temperature):
    model, (lora, params, micro) = case
    nll, entropy = jax.jit(label_nll_and_entropy(model, temperature=temperature))(lora, params, micro)
    logits = model.apply(
        params, lora, micro["tokens"], segments_BT=micro["segment_ids"], positions_BT=micro["positions"]
    )
    assert 0.25 < abs(np.asarray(logits)).max() < 0.3, "the cap must matter"
    logp = np.asarray(jax.nn.log_softmax(logits / temperature))
    labels = micro["labels"]
    expected = -np.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
    assert_close(nll.reshape(labels.shape), np.where(labels < 0, 0, expected), 1e-5)
    assert_close(entropy.reshape(labels.shape), np.where(labels < 0, 0, -(np.exp(logp) * logp).sum(-1)), 1e-5)
    assert_close(jax.jit(label_nll(model, temperature=temperature))(lora, params, micro), nll, 1e-6)


@pytest.mark.parametrize("of", [next_token_loss, label_nll, label_nll_and_entropy])
def test_head_tokens_is_how_many_have_logits_at_a_time(case, of):
    model, args = case
    whole, cut = (of(model, Remat(None, head_tokens=tokens)) for tokens in (None, 16))
    vocab = model.config.vocab_size
    assert f"f32[16,{vocab}]" in str(jax.make_jaxpr(cut)(*args))
    assert f"f32[16,{vocab}]" not in str(jax.make_jaxpr(whole)(*args))
    total = lambda of: lambda *args: sum(jnp.sum(each) for each in jax.tree.leaves(of(*args)))
    gradients = (jax.jit(jax.grad(total(each)))(*args) for each in (cut, whole))
    assert_trees_close(*gradients, 1e-5)
