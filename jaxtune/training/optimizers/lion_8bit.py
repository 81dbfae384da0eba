"""Lion with its one moment in 8 bits, as bitsandbytes keeps it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.training.optimizers.moments_8bit import SIGNED, map_one_by_one, packed_like, unpacked, zeros


class State(NamedTuple):
    """`mean` is a tree of the trained tree's structure, of `Packed` or float32 leaves."""

    mean: Any


def scale_by_lion_8bit(*, beta1: float, beta2: float) -> optax.GradientTransformation:
    """The sign of a mean that forgets by `beta1`, of which a slower one, by `beta2`, is all that is kept."""

    def init(trained: Any) -> State:
        return State(zeros(trained))

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        def one(grad: jax.Array, mean: Any) -> tuple[jax.Array, Any]:
            old = unpacked(mean, SIGNED)
            step = jnp.sign(beta1 * old + (1 - beta1) * grad)
            return step, packed_like(mean, beta2 * old + (1 - beta2) * grad, SIGNED)

        step, mean = map_one_by_one(one, grads, state.mean)
        return step, State(mean)

    return optax.GradientTransformation(init, update)
