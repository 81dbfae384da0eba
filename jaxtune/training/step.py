"""One optimizer step as one compiled program: gradients summed over micro-batches, divided by the trained tokens of
the whole step, clipped, applied. However the batch is cut, loss and gradient are the same.

What is trained is one tree, what it is trained beside another: an adapter and the base's `params`, or (full
fine-tuning) `params` and nothing. Gradients, the optimizer's arithmetic and its update are float32,
whatever the tree is kept in.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxtune.training.losses import MicroBatch, Tree, WatchedLoss, trained_tokens
from jaxtune.training.rounding import add_rounded
from jaxtune.training.schedules import Schedule

Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """What a step changes, and therefore what it donates."""

    step: jax.Array
    trained: Tree
    optimizer: Any


Step = Callable[[TrainState, Tree, MicroBatch], tuple[TrainState, Metrics]]
CompiledLater = Any
"""A `Step` that also has jit's `lower`."""


def init_state(
    trained: Tree, optimizer: optax.GradientTransformation, *, consume: bool = False
) -> TrainState:
    """The state before the first step, of a copy: steps donate their state. `consume=True` spares the copy, and the
    first step destroys what was given."""
    trained = trained if consume else jax.tree.map(jnp.copy, trained)
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(_float32(trained)))


def value_and_grad(
    loss: WatchedLoss, trained: Tree, frozen: Tree, batch: MicroBatch
) -> tuple[jax.Array, Tree, Metrics]:
    """Loss, gradient and what the loss watches, all means over the trained tokens of batch [A, R, L]: A micro-batches,
    one after the other."""
    of_sums = jax.value_and_grad(loss, has_aux=True)

    def add(carry, micro):
        (value, sums), grads = of_sums(trained, frozen, micro)
        return jax.tree.map(jnp.add, carry, (value, _float32(grads))), sums

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), trained))
    (value, grads), sums_A = lax.scan(add, zero, batch)
    # Divided at the end, in float32: as a factor of the loss it would reach the backward pass in the model's own
    # dtype, where in float16 it turns gradients into zeros.
    total = jnp.maximum(trained_tokens(batch), 1).astype(jnp.float32)
    watched = {name: each_A.sum() / total for name, each_A in sums_A.items()}
    return value / total, jax.tree.map(lambda g: g / total, grads), watched


def make_step(
    loss: WatchedLoss,
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    max_grad_norm: float | None,
    dropout_seed: int | None = None,
    rounding_seed: int = 0,
    compiler_options: dict[str, Any] | None = None,
) -> CompiledLater:
    """`max_grad_norm=None` does not clip; with a `dropout_seed`, what is dropped and what noise there is follow from
    it, the step's number and the micro-batch's. `rounding_seed` decides how what is kept in bfloat16 is rounded. An
    optimizer that asks hears whether the step `is_finite`. The state is donated."""

    update = optax.with_extra_args_support(optimizer).update

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options)
    def step(state: TrainState, frozen: Tree, batch: MicroBatch) -> tuple[TrainState, Metrics]:
        keys = {} if dropout_seed is None else {"dropout_key": dropout_keys(dropout_seed, state.step, batch)}
        value, grads, watched = value_and_grad(loss, state.trained, frozen, {**batch, **keys})
        norm = optax.tree.norm(grads)
        if max_grad_norm is not None:
            shrink = jnp.minimum(1.0, max_grad_norm / (norm + 1e-6))
            grads = jax.tree.map(lambda g: g * shrink, grads)
        is_finite = jnp.isfinite(value) & jnp.isfinite(norm)
        updates, optimizer_state = update(
            grads, state.optimizer, _float32(state.trained), is_finite=is_finite
        )
        key = jax.random.fold_in(jax.random.key(rounding_seed), state.step)
        trained = add_rounded(state.trained, updates, key)
        metrics = {
            "loss": value,
            "grad_norm": norm,
            "learning_rate": rate(state.step),
            "trained_tokens": trained_tokens(batch),
            "tokens": (batch["segment_ids"] > 0).sum(dtype=jnp.int32),
            **watched,
        }
        # The state first, as it came: donated buffers go to outputs of their shape in order, whatever the memory.
        return TrainState(state.step + 1, trained, optimizer_state), metrics

    return step


def _float32(tree: Tree) -> Tree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def dropout_keys(seed: int, step: jax.Array, batch: MicroBatch) -> jax.Array:
    """A key for each of a batch's micro-batches, [A]."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda a: jax.random.fold_in(key, a))(jnp.arange(batch["tokens"].shape[0]))
