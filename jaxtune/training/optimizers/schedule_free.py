"""Schedule-free learning: in place of a rate that falls, the average of where the steps have been.

Steps are taken by a point z, the average is x, and gradients are computed between the two, at y: this is the trained
tree while it is trained, and `averaged` gives x, which is what a run is for. Only z is kept; x follows from both.

optax's `schedule_free` asks the schedule for the next step's rate when it weighs this one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.device_memory import is_on_host, on_device
from jaxtune.training.schedules import Schedule


class State(NamedTuple):
    steps: optax.ScaleByScheduleState
    highest_rate: jax.Array
    weights: jax.Array
    """The sum of the weights of all steps so far."""
    beta1: jax.Array
    """How near y is to x; 0 is at z."""
    z: Any
    direction: Any
    """The state of what turns a gradient into a direction."""


def schedule_free(
    direction: optax.GradientTransformation, rate: Schedule, beta1: float, warmup_steps: int = 0
) -> optax.GradientTransformation:
    """A step weighs as much in the average as the square of the highest rate so far. Over `warmup_steps` the rate rises
    from its first part, beside what the schedule says: transformers' trainer hands them to both."""

    def init(trained: Any) -> State:
        zero = jnp.zeros((), jnp.float32)
        return State(
            steps=optax.ScaleByScheduleState(jnp.zeros((), jnp.int32)),
            highest_rate=zero,
            weights=jnp.zeros_like(zero),
            beta1=jnp.full((), beta1, jnp.float32),
            z=jax.tree.map(jnp.copy, trained),
            direction=direction.init(trained),
        )

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        own, direction_state = direction.update(grads, state.direction, trained)
        before = state.steps.count
        count = before + 1
        now = rate(before) * jnp.minimum(1.0, count.astype(jnp.float32) / max(1, warmup_steps))
        highest = jnp.maximum(state.highest_rate, now)
        weights = state.weights + highest**2
        share = jnp.where(weights > 0, highest**2 / jnp.where(weights > 0, weights, 1.0), 0.0)

        def one(y: jax.Array, z: jax.Array, u: jax.Array) -> jax.Array:
            return share * (z - y) - now * (1 - beta1 * (1 - share)) * u

        updates = jax.tree.map(one, trained, state.z, own)
        z = jax.tree.map(lambda z, u: z - now * u, state.z, own)
        return updates, State(
            optax.ScaleByScheduleState(count), highest, weights, state.beta1, z, direction_state
        )

    return optax.GradientTransformation(init, update)


def averaged(trained: Any, optimizer: Any) -> Any:
    """x, if the optimizer's state is one of schedule-free learning, and otherwise what is trained; in its dtypes."""
    if not isinstance(optimizer, State):
        return trained
    beta1 = optimizer.beta1

    def one(y: jax.Array, z: jax.Array) -> jax.Array:
        z = on_device(z) if is_on_host(z) else z
        return (z + (y.astype(jnp.float32) - z) / beta1).astype(y.dtype)

    return jax.tree.map(one, trained, optimizer.z)
