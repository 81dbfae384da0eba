"""The optimizer step of `training.step` for a loss that also says what is worth watching: gradients and sums added up
over micro-batches, divided by the trained tokens of the whole step, clipped, applied."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtune.models.causal_lm import Lora, Params
from jaxtune.rl.policy import LossAndSums
from jaxtune.training.losses import MicroBatch, trained_tokens
from jaxtune.training.optimizers import Schedule
from jaxtune.training.step import Metrics, Step, TrainState


def value_and_grad(
    loss: LossAndSums, lora: Lora, params: Params, batch: MicroBatch
) -> tuple[tuple[jax.Array, Metrics], Lora]:
    """((loss, metrics), gradient), all over the trained tokens of batch [A, R, L]."""
    of_sums = jax.value_and_grad(loss, has_aux=True)

    def add(carry, micro):
        (value, sums), grads = of_sums(lora, params, micro)
        return jax.tree.map(jnp.add, carry, (value, grads)), sums

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, lora))
    (value, grads), sums_A = lax.scan(add, zero, batch)
    # Divided at the end, in float32, for the sake of float16: see `training.step`.
    total = jnp.maximum(trained_tokens(batch), 1).astype(jnp.float32)
    mean = functools.partial(jax.tree.map, lambda x: x / total)
    return (value / total, mean({name: x.sum() for name, x in sums_A.items()})), mean(grads)


def make_step(
    loss: LossAndSums, optimizer: optax.GradientTransformation, rate: Schedule, max_grad_norm: float | None
) -> Step:
    """`max_grad_norm=None` does not clip. The state is donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, params: Params, batch: MicroBatch) -> tuple[TrainState, Metrics]:
        (value, watched), grads = value_and_grad(loss, state.lora, params, batch)
        norm = optax.tree.norm(grads)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.lora)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": rate(state.step),
            "trained_tokens": trained_tokens(batch),
            "tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.int32),
            **watched,
        }
        return TrainState(state.step + 1, optax.apply_updates(state.lora, updates), optimizer_state), metrics

    return step
