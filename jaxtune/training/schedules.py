"""Learning-rate schedules by their Hugging Face names."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

Schedule = Callable[[jax.Array], jax.Array]

SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")


def schedule(kind: str, learning_rate: float, warmup_steps: int, total_steps: int) -> Schedule:
    """The rate of each step, counted from 0, as transformers' schedulers give it."""

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        after = {
            "constant": jnp.ones_like(done),
            "constant_with_warmup": jnp.ones_like(done),
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(math.pi * done)),
        }[kind]
        if kind == "constant" or warmup_steps == 0:
            return learning_rate * after
        return learning_rate * jnp.where(step < warmup_steps, step / warmup_steps, after)

    return rate
