"""NEFTune's noise: how large it is, where it goes, and that only a training step has it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.integrations.neftune import neftune_post_forward_hook

from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.neftune import noise
from jaxtune.training.optimizers import adamw
from jaxtune.training.step import init_state, make_step
from tests.kit import tiny
from tests.kit.compare import assert_close

ALPHA, WIDTH = 5.0, 128
STILL = lambda step: jnp.float32(0.0)


def test_it_is_as_large_as_transformers():
    """Of one sample of 512 tokens: uniform, as its bounds and its spread say."""
    embedding = torch.nn.Embedding(8, WIDTH)
    embedding.neftune_noise_alpha = ALPHA
    theirs = neftune_post_forward_hook(embedding, None, torch.zeros(1, 512, WIDTH)).numpy()
    ours = np.asarray(noise(jax.random.key(0), jnp.ones((1, 512), jnp.int32), WIDTH, ALPHA))
    most = ALPHA / np.sqrt(512 * WIDTH)
    for each in (ours, theirs):
        assert 0.999 * most < np.abs(each).max() <= most
        assert each.std() == pytest.approx(most / np.sqrt(3), rel=0.01)
        assert abs(each.mean()) < 0.01 * most


def test_a_samples_noise_does_not_know_its_neighbours():
    """Three samples in two rows, of 4, 12 and 9 tokens, and padding."""
    segments = np.array([[1] * 4 + [2] * 12, [1] * 9 + [0] * 7], np.int32)
    ours = np.abs(noise(jax.random.key(0), jnp.asarray(segments), 1024, ALPHA))
    for row, of, length in ((0, 1, 4), (0, 2, 12), (1, 1, 9)):
        largest = ours[row][segments[row] == of].max()
        assert largest == pytest.approx(ALPHA / np.sqrt(length * 1024), rel=0.01)
    assert np.isfinite(ours).all()


def test_it_is_added_to_the_embeddings():
    """As if the table were another one; every token occurs once."""
    model = tiny.model(windows=(None,), embedding_multiplier=3.0)
    params = tiny.params(model)
    tokens = jnp.arange(24)[None]
    drawn = noise(jax.random.key(0), jnp.ones((1, 24), jnp.int32), WIDTH, 100.0)
    table = params["embed_tokens"]["weight"].at[tokens[0]].add(drawn[0] / 3.0)
    ours, _ = model.hidden(params, None, tokens, noise_BTM=drawn)
    expected, _ = model.hidden({**params, "embed_tokens": {"weight": table}}, None, tokens)
    assert_close(ours, expected, 1e-5)
    assert not np.allclose(ours, model.hidden(params, None, tokens)[0], rtol=1e-2)


@pytest.fixture(scope="module")
def losses():
    """(seed, alpha) -> the losses of two steps on one batch at a rate of 0, which differ by their noise alone."""
    model = tiny.model(windows=(None,))
    params, lora = tiny.params(model), tiny.lora(model)
    batch = tiny.batch(micro_batches=1)
    optimizer = adamw(STILL, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)

    def run(seed, alpha):
        loss = unwatched(next_token_loss(model, neftune_noise_alpha=alpha))
        step = make_step(loss, optimizer, STILL, None, dropout_seed=seed)
        state, values = init_state(lora, optimizer), []
        for _ in range(2):
            state, metrics = step(state, params, batch)
            values.append(float(metrics["loss"]))
        return values

    return run


def test_every_step_draws_anew_and_a_seed_draws_the_same(losses):
    noisy = losses(1, ALPHA)
    assert noisy[0] != noisy[1]
    assert losses(1, ALPHA) == noisy
    assert losses(2, ALPHA) != noisy


def test_what_is_no_training_step_has_none(losses):
    quiet = losses(None, None)
    assert quiet[0] == quiet[1]
    assert losses(None, ALPHA) == quiet
