"""Log-probabilities without logits, the reference, batches made of rollouts, and a step that does not depend on how
they are cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.data.layout import MENU_SIZE, Limits, Shape, cheapest_fit
from jaxtune.inference.generate import generate
from jaxtune.models import names
from jaxtune.rl.losses import policy_terms, sequence_weights
from jaxtune.rl.policy import grpo_loss, log_probs, log_probs_and_entropy, of_all_micro_batches
from jaxtune.rl.rollout import Rollout, lay_out_rollout, roll_out, shapes
from jaxtune.training.step import value_and_grad
from tests.kit import tiny
from tests.kit.compare import assert_close, assert_trees_close

LENGTHS = [(5, 9), (17, 4), (5, 1), (11, 12), (2, 7), (2, 3), (9, 9), (9, 2)]
OPTIONS = dict(epsilon=0.2, epsilon_high=None, beta=0.2, use_bias_correction_kl=True)
ADVANTAGES = np.linspace(-1, 1.5, 8).astype(np.float32)


@pytest.fixture(scope="module")
def case():
    model = tiny.model(windows=(None,))
    return model, tiny.params(model), tiny.lora(model)


@pytest.fixture(scope="module")
def rollout():
    """Made up: 8 completions of 1 to 12 tokens, the third and the last cut off."""
    rng = np.random.default_rng(0)
    ids = [[rng.integers(0, 128, n).tolist() for n in lengths] for lengths in LENGTHS]
    finished = np.array([True, True, False, True, True, True, True, False])
    return Rollout([prompt for prompt, _ in ids], [completion for _, completion in ids], finished)


def batch_of(rollout, shape, trained_S=None, **values):
    trained_S = np.ones(8, bool) if trained_S is None else trained_S
    return lay_out_rollout(rollout, trained_S, [shape], **values)


def by_apply(model, params, lora, rollout, temperature=1.0):
    """log softmax of whole logits at the label, [S] lists over each completion's tokens."""
    return [
        jnp.take_along_axis(logps, jnp.asarray(completion)[:, None], axis=1)[:, 0]
        for logps, completion in zip(
            softmaxes(model, params, lora, rollout, temperature), rollout.completion_ids, strict=True
        )
    ]


def softmaxes(model, params, lora, rollout, temperature=1.0):
    """log softmax of whole logits, [S] lists of [tokens of the completion, V]."""
    longest = max(map(sum, LENGTHS))
    tokens = np.zeros((8, longest), np.int32)
    for row, (prompt, completion) in enumerate(zip(rollout.prompt_ids, rollout.completion_ids, strict=True)):
        tokens[row, : len(prompt) + len(completion)] = prompt + completion
    logps = jax.nn.log_softmax(jax.jit(model.apply)(params, lora, tokens) / temperature)
    return [logps[s, p - 1 : p + c - 1] for s, (p, c) in enumerate(LENGTHS)]


def of_completion(batch, array, s):
    """The values of completion s in an array of the batch's shape; `advantages` holds 1 + s where it lies."""
    return np.asarray(array)[batch["advantages"] == 1 + s]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("adapter", [True, False], ids=["policy", "reference"])
def test_log_probs_are_log_softmax_of_apply(case, rollout, adapter, temperature):
    model, params, lora = case
    lora = lora if adapter else None
    batch = batch_of(rollout, Shape(2, 2, 64), advantages=np.arange(1, 9))
    ours = of_all_micro_batches(log_probs(model, temperature))(lora, params, batch)
    for s, theirs in enumerate(by_apply(model, params, lora, rollout, temperature)):
        assert_close(of_completion(batch, ours, s), theirs, 1e-5, f"completion {s}")
    np.testing.assert_array_equal(ours[batch["labels"] == -100], 0)


def test_entropies_are_those_of_the_softmax_of_apply(case, rollout):
    model, params, lora = case
    batch = batch_of(rollout, Shape(2, 2, 64), advantages=np.arange(1, 9))
    logps, entropy = of_all_micro_batches(log_probs_and_entropy(model, 0.7))(lora, params, batch)
    for s, each in enumerate(softmaxes(model, params, lora, rollout, 0.7)):
        assert_close(
            of_completion(batch, entropy, s), -(jnp.exp(each) * each).sum(axis=1), 1e-5, f"completion {s}"
        )
    np.testing.assert_array_equal(entropy[batch["labels"] == -100], 0)
    assert_close(logps, of_all_micro_batches(log_probs(model, 0.7))(lora, params, batch), 1e-6)


def test_the_reference_is_the_base_whatever_the_adapter(case, rollout):
    """A fresh adapter changes nothing: the policy that has it and the reference are one."""
    model, params, lora = case
    batch = batch_of(rollout, Shape(1, 4, 64))
    function = of_all_micro_batches(log_probs(model))
    asleep = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if names.keys(path)[-1] == "b" else x, lora
    )
    reference = function(None, params, batch)
    assert_close(function(asleep, params, batch), reference, 1e-6)
    assert not np.allclose(function(lora, params, batch), reference, atol=1e-3)


def test_a_rollouts_batch_says_what_is_trained_and_with_what_value(rollout):
    batch = batch_of(rollout, Shape(2, 2, 64), advantages=np.arange(1, 9), weights=np.full(8, 0.5))
    for s, completion in enumerate(rollout.completion_ids):
        assert of_completion(batch, batch["labels"], s).tolist() == completion
    assert (batch["labels"] != -100).sum() == rollout.lengths_S.sum()
    np.testing.assert_array_equal(batch["weights"] == 0.5, batch["labels"] != -100)
    assert rollout.num_tokens == (batch["segment_ids"] > 0).sum() == sum(map(sum, LENGTHS))


def test_masked_completions_have_no_labels(rollout):
    batch = batch_of(rollout, Shape(2, 2, 64), rollout.finished_S, advantages=np.arange(1, 9))
    for s, finished in enumerate(rollout.finished_S):
        assert len(of_completion(batch, batch["labels"], s)) == (LENGTHS[s][1] if finished else 0)
    assert (batch["segment_ids"] > 0).sum() == sum(map(sum, LENGTHS))


def test_the_menu_holds_every_rollout_and_short_ones_take_less():
    limits = Limits(4, 2, 700)
    menu = shapes(limits)
    assert len(menu) <= MENU_SIZE
    assert cheapest_fit([700] * 8, menu) == limits.largest
    work = [cheapest_fit([length] * 8, menu).work for length in (700, 300, 100, 20)]
    assert work == sorted(work, reverse=True)
    assert len(set(work)) == len(work)
    assert shapes(Limits(1, 4, 50)) == (Shape(1, 4, 64),)


@pytest.fixture(scope="module")
def compute(case):
    """(lora, params, batch) -> (loss, gradient, metrics), compiled once for each shape."""
    loss = grpo_loss(log_probs_and_entropy(case[0], entropy_gradient=False), **OPTIONS)
    return jax.jit(functools.partial(value_and_grad, loss))


@pytest.fixture(scope="module")
def scored(case):
    return of_all_micro_batches(log_probs(case[0]))


@pytest.fixture(scope="module")
def full_batch(case, rollout, scored):
    """Everything that the loss reads; the policy that sampled differs a little from the one that learns."""
    _, params, lora = case

    def of_shape(shape):
        weights_S = sequence_weights("grpo", rollout.lengths_S, micro_batch=4, max_completion_length=12)
        batch = batch_of(rollout, shape, advantages=ADVANTAGES, weights=np.asarray(weights_S))
        old = scored(jax.tree.map(lambda x: 0.9 * x, lora), params, batch)
        return {**batch, "old_logps": old, "ref_logps": scored(None, params, batch)}

    return of_shape


@pytest.fixture(scope="module")
def expected(case, compute, full_batch):
    """Of the whole batch in one piece."""
    _, params, lora = case
    return compute(lora, params, full_batch(Shape(1, 8, 64)))


def test_loss_gradient_and_metrics_do_not_depend_on_the_cut(case, compute, full_batch, expected):
    _, params, lora = case
    value, grads, metrics = compute(lora, params, full_batch(Shape(3, 1, 64)))
    assert_close(value, expected[0], 1e-5)
    assert_trees_close(metrics, expected[2], 1e-4)
    assert_trees_close(grads, expected[1], 1e-4)
    assert metrics["kl"] > 0


def test_the_entropy_reported_is_the_mean_over_completion_tokens(case, rollout, expected):
    each = jnp.concatenate(softmaxes(*case, rollout))
    assert_close(expected[2]["entropy"], -(jnp.exp(each) * each).sum(axis=1).mean(), 1e-5)


def test_loss_and_gradient_are_those_of_whole_logits(case, rollout, expected):
    """The same objective from `apply` and a softmax, in a plain mean of means."""
    model, params, lora = case
    old = by_apply(model, params, jax.tree.map(lambda x: 0.9 * x, lora), rollout)
    ref = by_apply(model, params, None, rollout)

    def plain(lora):
        logps = by_apply(model, params, lora, rollout)
        losses = [
            policy_terms(logps[s], old[s], advantages, epsilon=0.2, ref_logps=ref[s], beta=0.2).loss.mean()
            for s, advantages in enumerate(
                jnp.full(len(each), value) for each, value in zip(logps, ADVANTAGES, strict=True)
            )
        ]
        return sum(losses) / len(losses)

    value, grads = jax.jit(jax.value_and_grad(plain))(lora)
    assert_close(expected[0], value, 1e-4)
    assert_trees_close(expected[1], grads, 1e-3)


def test_without_old_log_probs_the_policy_is_the_one_that_sampled(case, compute, scored, full_batch):
    """The gradient of the ratio at 1, and the loss too: an old policy that is the present one changes neither."""
    _, params, lora = case
    batch = full_batch(Shape(1, 8, 64))
    present = scored(lora, params, batch)
    given, grads_given, _ = compute(lora, params, {**batch, "old_logps": present})
    del batch["old_logps"]
    without, grads, _ = compute(lora, params, batch)
    assert_close(without, given, 1e-5)
    assert_trees_close(grads, grads_given, 1e-4)


def test_a_rollout_samples_groups_and_knows_what_was_cut_off(case):
    model, params, lora = case
    prompts = [[1, 2, 3], [7] * 9]
    stops = tuple(range(24))
    settings = dict(max_completion_length=6, temperature=1.3, stop_ids=stops)
    rollout = roll_out(model, params, lora, prompts, num_generations=8, key=jax.random.key(0), **settings)
    assert rollout.prompt_ids == [prompts[0]] * 8 + [prompts[1]] * 8
    assert len(set(map(tuple, rollout.completion_ids))) > 8
    assert 0 < rollout.finished_S.sum() < 16
    for ids, finished in zip(rollout.completion_ids, rollout.finished_S, strict=True):
        assert finished == (ids[-1] in stops)
        assert finished or len(ids) == 6
    again = generate(
        model, params, lora, rollout.prompt_ids, max_new_tokens=6, stop_ids=stops, temperature=1.3,
        key=jax.random.key(0),
    )  # fmt: skip
    assert again == rollout.completion_ids
