"""The mathematics of GRPO, over plain arrays: rewards to advantages, log-probabilities to a loss per token, and what
each kind of loss divides by. Usable alone, under jit, grad and vmap.

Shapes: S completions (the G of one prompt side by side), F reward functions, `...` tokens in any arrangement.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
SCALES = ("group", "batch", "none")

STD_FLOOR = 1e-4
"""Added to a standard deviation before advantages are divided by it."""


class PolicyTerms(NamedTuple):
    """For every token: what is to be minimised, and how far the policy has moved."""

    loss: jax.Array
    kl: jax.Array
    """Estimated divergence from the reference; 0 without one."""
    clipped_low: jax.Array
    """1.0 where a bad token's ratio fell below 1 - epsilon, so that it has no gradient any more."""
    clipped_high: jax.Array
    """1.0 where a good token's ratio rose above 1 + epsilon_high."""


def total_rewards(rewards_SF: jax.Array, weights_F: jax.Array) -> jax.Array:
    """Weighted sum [S] over the reward functions that had an answer; NaN where none had (each said NaN)."""
    answered_SF = ~jnp.isnan(rewards_SF)
    total_S = (jnp.where(answered_SF, rewards_SF, 0.0) * weights_F[None, :]).sum(axis=1)
    return jnp.where(answered_SF.any(axis=1), total_S, jnp.nan)


def nan_std(x: jax.Array, axis: int | None = None) -> jax.Array:
    """Standard deviation of what is not NaN, with Bessel's correction; 0 of fewer than two values. Keeps the axis."""
    known = ~jnp.isnan(x)
    count = known.astype(x.dtype).sum(axis=axis, keepdims=True)
    mean = jnp.where(known, x, 0.0).sum(axis=axis, keepdims=True) / jnp.maximum(count, 1.0)
    squares = jnp.where(known, jnp.square(x - mean), 0.0).sum(axis=axis, keepdims=True)
    return jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0))


def group_advantages(
    rewards_S: jax.Array, num_generations: int, scale: str = "group"
) -> tuple[jax.Array, jax.Array]:
    """(advantages [S], standard deviations [S]): how much better each completion is than its group's mean.

    `scale` says what that is divided by: the deviation of the "group", of the whole "batch", or "none" (the deviations
    returned are then the groups'). A reward of NaN counts for nothing, and has advantage 0. So has each of a group that
    are all alike, exactly: what rounding leaves of them would be noise, which Adam makes steps of."""
    rewards_NG = rewards_S.reshape(-1, num_generations)
    alike_N1 = jnp.nanmax(rewards_NG, axis=1, keepdims=True) == jnp.nanmin(rewards_NG, axis=1, keepdims=True)
    std = nan_std(rewards_NG, None if scale == "batch" else 1)
    std_NG = jnp.broadcast_to(std if scale == "batch" else jnp.where(alike_N1, 0.0, std), rewards_NG.shape)
    advantages_NG = rewards_NG - jnp.nanmean(rewards_NG, axis=1, keepdims=True)
    advantages_NG = jnp.where(alike_N1, 0.0, advantages_NG)
    if scale != "none":
        advantages_NG = advantages_NG / (std_NG + STD_FLOOR)
    advantages_NG = jnp.where(jnp.isnan(rewards_NG), 0.0, advantages_NG)
    return advantages_NG.reshape(-1), std_NG.reshape(-1)


def kl_divergence(logps: jax.Array, ref_logps: jax.Array) -> jax.Array:
    """An estimate per token of KL(policy || reference) from samples of the policy: unbiased, never negative (k3)."""
    difference = ref_logps - logps
    return jnp.exp(difference) - difference - 1.0


def policy_terms(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    ref_logps: jax.Array | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
) -> PolicyTerms:
    """The clipped surrogate of every token, plus `beta` times the divergence from the reference if one is given. All
    arrays have the shape of the tokens; `old_logps` are those of the policy that sampled them. The ratio of the two
    also weights the divergence if `use_bias_correction_kl`."""
    low, high = 1.0 - epsilon, 1.0 + (epsilon if epsilon_high is None else epsilon_high)
    ratio = jnp.exp(logps - old_logps)
    loss = -jnp.minimum(ratio * advantages, jnp.clip(ratio, low, high) * advantages)
    kl = jnp.zeros_like(logps)
    if ref_logps is not None:
        kl = kl_divergence(logps, ref_logps)
        kl = kl * ratio if use_bias_correction_kl else kl
        loss = loss + beta * kl
    return PolicyTerms(
        loss,
        kl,
        ((ratio < low) & (advantages < 0)).astype(jnp.float32),
        ((ratio > high) & (advantages > 0)).astype(jnp.float32),
    )


def sequence_weights(
    loss_type: str, tokens_S: jax.Array, *, micro_batch: int, max_completion_length: int
) -> jax.Array:
    """The weight [S] of a completion's tokens, relative to the mean over all trained tokens of the step.

    sum(weight x loss) / sum(tokens) is then, with `tokens_S` trained tokens in each completion of the step:
    "dapo": the mean over tokens; "grpo": the mean over completions of their means over tokens; "bnpo": the mean over
    micro-batches (of `micro_batch` completions, in order) of their means over tokens; "dr_grpo": the sum by the tokens
    that there could have been."""
    tokens_S = jnp.asarray(tokens_S, jnp.float32)
    S = tokens_S.shape[0]
    total = jnp.maximum(tokens_S.sum(), 1.0)
    if loss_type == "dapo":
        return jnp.ones_like(tokens_S)
    if loss_type == "grpo":
        return total / (S * jnp.maximum(tokens_S, 1.0))
    if loss_type == "dr_grpo":
        return jnp.full_like(tokens_S, total / (S * max_completion_length))
    if loss_type == "bnpo":
        tokens_A = jnp.maximum(tokens_S.reshape(-1, micro_batch).sum(axis=1), 1.0)
        return total / (tokens_A.shape[0] * jnp.repeat(tokens_A, micro_batch))
    raise ValueError(f"loss_type is {loss_type!r}, and has to be one of {', '.join(LOSS_TYPES)}")
