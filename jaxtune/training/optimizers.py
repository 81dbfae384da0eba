"""Learning-rate schedules and optimizers by their Hugging Face names."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtune.training.adam_8bit import scale_by_adam_8bit

Schedule = Callable[[jax.Array], jax.Array]

SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")
OPTIMIZERS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), 8),
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused"), 32),
}
"""Bits in which AdamW keeps its moments, by transformers' name."""


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


def adamw(
    rate: Schedule, *, beta1: float, beta2: float, epsilon: float, weight_decay: float, bits: int = 32
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, as torch computes it, on what transformers' trainer decays. In 8 bits its
    moments are kept as bitsandbytes keeps them."""
    if bits == 8:
        scale = scale_by_adam_8bit(beta1=beta1, beta2=beta2, epsilon=epsilon)
    else:
        scale = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)
    decay = optax.add_decayed_weights(weight_decay, mask=decays)
    return any_promotion(optax.chain(scale, decay, optax.scale_by_learning_rate(rate)))


def decays(trained: Any) -> Any:
    """Whether a leaf decays: all but biases and the weights of norms."""

    def of(path, _):
        return path[-1].key != "bias" and not any("norm" in str(getattr(key, "key", "")) for key in path)

    return jax.tree_util.tree_map_with_path(of, trained)


def any_promotion(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer under JAX's standard dtype promotion: optax mixes its int32 step count with floats, which
    users who run with strict promotion could not."""

    def relaxed(function):
        @functools.wraps(function)
        def call(*args):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args)

        return call

    return optax.GradientTransformation(relaxed(optimizer.init), relaxed(optimizer.update))
