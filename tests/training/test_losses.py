"""The loss sees the logits that the model gives: scaled, capped, and divided by a temperature in that order. What SFT
may have in place of their negative log-likelihood is transformers' and TRL's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

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


def loss_of_logits(case, of_log_probabilities):
    """(lora, params, batch) -> a loss of the log-probabilities [R, L, V] that the model gives."""
    model, _ = case

    def loss(lora, params, micro):
        where = dict(segments_BT=micro["segment_ids"], positions_BT=micro["positions"])
        return of_log_probabilities(jax.nn.log_softmax(model.apply(params, lora, micro["tokens"], **where)))

    return loss


def test_smoothed_labels_are_transformers(case):
    model, args = case
    ours = jax.jit(next_token_loss(model, label_smoothing=0.2))(*args)
    logp = loss_of_logits(case, lambda logp: logp)(*args)
    labels = torch.tensor(np.asarray(args[2]["labels"])).long()
    smoother = LabelSmoother(epsilon=0.2)
    theirs = smoother({"logits": torch.tensor(np.asarray(logp))}, labels, num_items_in_batch=1)
    assert_close(ours, theirs.numpy(), 1e-5)
    assert abs(ours - jax.jit(next_token_loss(model))(*args)) > 0.01


def test_the_z_loss_is_added_to_each_token(case):
    """Autodiff of whole logits; without, it is the loss as usual."""
    model, args = case
    labels = args[2]["labels"]

    def written_out(lora, params, micro):
        where = dict(segments_BT=micro["segment_ids"], positions_BT=micro["positions"])
        lse = jax.nn.logsumexp(model.apply(params, lora, micro["tokens"], **where), axis=-1)
        return next_token_loss(model)(lora, params, micro) + 0.1 * jnp.where(labels < 0, 0, lse**2).sum()

    ours, expected = (
        jax.jit(jax.value_and_grad(loss))(*args) for loss in (next_token_loss(model, z_loss=0.1), written_out)
    )
    assert_close(ours[0], expected[0], 1e-5)
    assert_trees_close(ours[1], expected[1], 1e-4)


def test_dynamic_fine_tuning_is_trls(case):
    """-log p times p, through which no gradient flows."""
    model, args = case
    labels = args[2]["labels"]

    def written_out(logp):
        of_label = jnp.take_along_axis(logp, np.maximum(labels, 0)[..., None], -1)[..., 0]
        return jnp.where(labels < 0, 0, -of_label * jax.lax.stop_gradient(jnp.exp(of_label))).sum()

    ours, expected = (
        jax.jit(jax.value_and_grad(loss))(*args)
        for loss in (next_token_loss(model, loss_type="dft"), loss_of_logits(case, written_out))
    )
    assert_close(ours[0], expected[0], 1e-5)
    assert_trees_close(ours[1], expected[1], 1e-4)
