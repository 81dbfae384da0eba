"""What a rollout's rewards and completions look like in numbers, under TRL's names."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxtune.rl.losses import nan_std
from jaxtune.rl.rollout import Rollout
from jaxtune.training.loop import Record

ZERO_STD = 1e-8
"""A group's deviation up to here is 0: its completions teach nothing."""


def reward_facts(
    names: Sequence[str], rewards_SF: np.ndarray, total_S: np.ndarray, std_S: np.ndarray
) -> Record:
    """Over the completions that a function had an answer for; a name without any answer is left out."""
    columns = {f"rewards/{name}/": rewards_SF[:, i] for i, name in enumerate(names)}
    facts: Record = {}
    for prefix, rewards in columns.items():
        if not np.isnan(rewards).all():
            facts[f"{prefix}mean"] = float(np.nanmean(rewards))
            facts[f"{prefix}std"] = _std(rewards)
    if not np.isnan(total_S).all():
        facts["reward"] = float(np.nanmean(total_S))
        facts["reward_std"] = _std(total_S)
    return {**facts, "frac_reward_zero_std": float((std_S <= ZERO_STD).mean())}


def _std(values: np.ndarray) -> float:
    return float(nan_std(jnp.asarray(values))[0])


def completion_facts(rollout: Rollout) -> Record:
    """`terminated` are the completions that got to a stop token; 0 if none did."""
    lengths, finished = rollout.lengths_S, rollout.finished_S
    terminated = lengths[finished] if finished.any() else np.zeros(1)
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~finished).mean()),
        "completions/mean_terminated_length": float(terminated.mean()),
        "completions/min_terminated_length": float(terminated.min()),
        "completions/max_terminated_length": float(terminated.max()),
    }
