"""Adam with both moments in 8 bits, as bitsandbytes keeps them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.training.optimizers.moments_8bit import (
    SIGNED,
    UNSIGNED,
    map_one_by_one,
    packed_like,
    unpacked,
    zeros,
)


class State(NamedTuple):
    """`mean` and `square` are trees of the trained tree's structure, of `Packed` or float32 leaves."""

    steps: jax.Array
    mean: Any
    square: Any


def scale_by_adam_8bit(*, beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """mean / (sqrt(square) + epsilon), both corrected for their bias, as torch and bitsandbytes have it: what is new
    enters the update before it is rounded to 8 bits."""

    def init(trained: Any) -> State:
        return State(jnp.zeros((), jnp.int32), zeros(trained), zeros(trained))  # apart: a step donates both

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        count = state.steps + 1
        correction1, correction2 = (
            1 - jnp.float32(beta) ** count.astype(jnp.float32) for beta in (beta1, beta2)
        )

        def one(grad: jax.Array, mean: Any, square: Any) -> tuple[jax.Array, Any, Any]:
            new_mean = beta1 * unpacked(mean, SIGNED) + (1 - beta1) * grad
            new_square = beta2 * unpacked(square, UNSIGNED) + (1 - beta2) * grad * grad
            step = (new_mean / correction1) / (jnp.sqrt(new_square / correction2) + epsilon)
            return step, packed_like(mean, new_mean, SIGNED), packed_like(square, new_square, UNSIGNED)

        step, mean, square = map_one_by_one(one, grads, state.mean, state.square)
        return step, State(count, mean, square)

    return optax.GradientTransformation(init, update)
