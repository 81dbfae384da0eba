"""The mathematics of GRPO against TRL's own: its loss method and its scoring method run on the same numbers."""

import contextlib
import types
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer

from jaxtune.rl.losses import (
    LOSS_TYPES,
    group_advantages,
    policy_terms,
    sequence_weights,
    total_rewards,
)

MICRO, STEPS, LONGEST = 4, 2, 12
ALL = MICRO * STEPS
TRL_ACCELERATOR = types.SimpleNamespace(
    num_processes=1, process_index=0, device="cpu", gather=lambda x: x, reduce=lambda x, reduction: x
)


def case(seed=0):
    """Log-probabilities of 8 completions of 0 to 12 tokens; ratios well beyond both sides of the clip."""
    rng = np.random.default_rng(seed)
    shape = (ALL, LONGEST)
    logps = -rng.exponential(2.0, shape).astype(np.float32)
    lengths = np.array([12, 3, 7, 1, 12, 5, 0, 9])
    return types.SimpleNamespace(
        logps=logps,
        old=logps + rng.normal(0, 0.3, shape).astype(np.float32),
        ref=logps + rng.normal(0, 0.5, shape).astype(np.float32),
        advantages=rng.normal(0, 1, ALL).astype(np.float32),
        lengths=lengths,
        mask=(np.arange(LONGEST) < lengths[:, None]).astype(np.float32),
    )


def trl_loss(c, **settings):
    """What TRL's trainer would minimise in one optimizer step: its `_compute_loss` summed over micro-batches. The stand
    -in for the trainer has the attributes that the method reads; log-probabilities are given instead of computed."""
    logps = torch.tensor(c.logps, requires_grad=True)
    high = settings["epsilon_high"]
    trainer = types.SimpleNamespace(
        accelerator=TRL_ACCELERATOR,
        args=types.SimpleNamespace(
            delta=None,
            steps_per_generation=STEPS,
            use_bias_correction_kl=settings["use_bias_correction_kl"],
        ),
        model=types.SimpleNamespace(training=True),
        loss_type=settings["loss_type"],
        beta=settings["beta"],
        epsilon_low=settings["epsilon"],
        epsilon_high=settings["epsilon"] if high is None else high,
        importance_sampling_level="token",
        max_completion_length=LONGEST + 4,
        current_gradient_accumulation_steps=STEPS,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    total = torch.zeros(())
    for start in range(0, ALL, MICRO):
        here = slice(start, start + MICRO)
        trainer._get_per_token_logps_and_entropies = lambda *_, here=here, **__: (
            logps[here],
            torch.zeros_like(logps[here]),
            None,
        )
        ids = torch.zeros((MICRO, LONGEST), dtype=torch.long)
        inputs = {
            "prompt_ids": ids,
            "prompt_mask": ids,
            "completion_ids": ids,
            "completion_mask": torch.tensor(c.mask[here]),
            "advantages": torch.tensor(c.advantages[here]),
            "old_per_token_logps": torch.tensor(c.old[here]),
            "ref_per_token_logps": torch.tensor(c.ref[here]),
            "num_items_in_batch": torch.tensor(c.mask.sum()),
        }
        total = total + GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    total.backward()
    return total.item(), logps.grad.numpy(), trainer._metrics["train"]


def our_terms(c, logps, settings):
    options = {name: value for name, value in settings.items() if name != "loss_type"}
    ref = c.ref if settings["beta"] else None
    return policy_terms(logps, c.old, jnp.tile(c.advantages[:, None], LONGEST), ref_logps=ref, **options)


def our_loss(c, **settings):
    weights_S = sequence_weights(
        settings["loss_type"], c.lengths, micro_batch=MICRO, max_completion_length=LONGEST + 4
    )

    def loss(logps):
        loss = our_terms(c, logps, settings).loss
        return (jnp.tile(weights_S[:, None], LONGEST) * loss * c.mask).sum() / c.mask.sum()

    return jax.jit(jax.value_and_grad(loss))(c.logps)


BASE = dict(loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=None, use_bias_correction_kl=True)
CASES = [
    *({"loss_type": loss_type, "beta": beta} for loss_type in LOSS_TYPES for beta in (0.0, 0.3)),
    {"epsilon": 0.1, "epsilon_high": 0.4},
    {"beta": 0.3, "use_bias_correction_kl": False},
]


@pytest.mark.parametrize("changes", CASES, ids=str)
def test_loss_and_gradient_are_trls(changes):
    settings = {**BASE, **changes}
    theirs, their_gradient, _ = trl_loss(case(), **settings)
    ours, our_gradient = our_loss(case(), **settings)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(our_gradient, their_gradient, rtol=1e-5, atol=1e-7)


def test_the_cases_differ_from_one_another():
    losses = [float(our_loss(case(), **{**BASE, **changes})[0]) for changes in CASES]
    assert len({round(loss, 4) for loss in losses}) == len(CASES)


def test_clip_ratios_and_kl_are_trls():
    """TRL means over each micro-batch and then over them; here both have the same number of tokens."""
    c = case()
    c.lengths = np.array([12, 3, 7, 1, 12, 3, 7, 1])
    c.mask = (np.arange(LONGEST) < c.lengths[:, None]).astype(np.float32)
    settings = {**BASE, "beta": 0.3}
    _, _, theirs = trl_loss(c, **settings)
    terms = our_terms(c, c.logps, settings)
    for name, ours in {
        "kl": terms.kl,
        "clip_ratio/low_mean": terms.clipped_low,
        "clip_ratio/high_mean": terms.clipped_high,
    }.items():
        assert (np.asarray(ours) * c.mask).sum() > 0, f"{name}: nothing to compare"
        np.testing.assert_allclose((ours * c.mask).sum() / c.mask.sum(), np.mean(theirs[name]), rtol=1e-5)


class _Scored(Exception):
    """Ends TRL's method where its advantages are ready."""


def trl_advantages(rewards_SF, weights, num_generations, scale):
    """From TRL's `_generate_and_score_completions`, with completions and rewards given instead of made."""
    n = len(rewards_SF)
    model = types.SimpleNamespace(training=True)
    trainer = types.SimpleNamespace(
        accelerator=TRL_ACCELERATOR,
        model=model,
        args=types.SimpleNamespace(
            per_device_train_batch_size=n,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        environment_factories=None,
        environments=None,
        tools=None,
        _tokenizer=types.SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        num_generations=num_generations,
        multi_objective_aggregation="sum_then_normalize",
        reward_weights=torch.tensor(weights),
        reward_func_names=[f"f{i}" for i in range(len(weights))],
        scale_rewards=scale,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: ([[1]] * n, [[1]] * n, None, ["a"] * n, None, {}, None, None),
        _calculate_rewards=lambda *_: torch.tensor(rewards_SF),
    )
    output = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "a"}] * n)
    return output["advantages"].numpy(), trainer._metrics["train"]


@contextlib.contextmanager
def _no_gradient_checkpointing(*_):
    yield


@pytest.fixture
def bare_model(monkeypatch):
    """TRL turns the model's gradient checkpointing off while it scores; the stand-in has none."""
    name = "trl.trainer.grpo_trainer.disable_gradient_checkpointing"
    monkeypatch.setattr(name, _no_gradient_checkpointing)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(bare_model, scale):
    rng = np.random.default_rng(1)
    rewards_SF = rng.normal(0, 2, (12, 2)).astype(np.float32)
    rewards_SF[1, 0] = rewards_SF[5] = rewards_SF[6, 1] = np.nan  # one function silent, or both
    rewards_SF[8:] = 1.5  # nothing to learn from this group
    weights = [0.5, 2.0]
    theirs, metrics = trl_advantages(rewards_SF, weights, 4, scale)
    total_S = total_rewards(rewards_SF, jnp.asarray(weights, "float32"))
    ours, std_S = group_advantages(total_S, 4, scale)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours[5] == 0
    np.testing.assert_allclose((np.asarray(std_S) <= 1e-8).mean(), metrics["frac_reward_zero_std"][0])
    np.testing.assert_allclose(np.nanmean(total_S), metrics["reward"][0], rtol=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_that_are_alike_teach_exactly_nothing(scale):
    """0.7 has no float32 of its own, and the mean of eight of them is another number."""
    rewards = jnp.array([0.7] * 8 + [0.1, jnp.nan] * 4 + [0.0, 1.0] * 4)
    advantages, std = group_advantages(rewards, 8, scale)
    np.testing.assert_array_equal(advantages[:16], 0)
    assert jnp.abs(advantages[16:]).min() > 0.4
    if scale != "batch":
        np.testing.assert_array_equal(std[:16], 0)


def test_a_reward_that_nothing_can_be_compared_with_teaches_nothing():
    nan = np.nan
    rewards_S = jnp.asarray([nan, nan, nan, 3.0, nan, nan, nan, nan], "float32")
    for scale in ("group", "batch", "none"):
        np.testing.assert_array_equal(group_advantages(rewards_S, 4, scale)[0], np.zeros(8))


def test_the_pure_functions_run_under_jit_and_vmap():
    c = case()
    terms = jax.jit(jax.vmap(lambda *row: policy_terms(*row).loss))
    np.testing.assert_allclose(
        terms(c.logps, c.old, np.tile(c.advantages[:, None], LONGEST)),
        our_terms(c, c.logps, BASE).loss,
        rtol=1e-6,
        atol=1e-7,
    )
    advantages = jax.vmap(lambda r: group_advantages(r, 4)[0])(c.logps[:2, :8])
    np.testing.assert_allclose(advantages[1], group_advantages(c.logps[1, :8], 4)[0], rtol=1e-6)
    with pytest.raises(ValueError, match="bnpo"):
        sequence_weights("gropo", c.lengths, micro_batch=2, max_completion_length=3)
