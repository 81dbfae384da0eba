"""Adafactor: the mean square of a matrix's gradient is kept as that of its rows and that of its columns.

As transformers' trainer sets it up: the rate is the schedule's alone, there is no mean gradient, and what a step would
move a weight by is held to 1 in root mean square."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxtune.models import names
from jaxtune.training.optimizers.leaves import is_stack, of_leaves

FORGETTING = -0.8
"""Power of the step's number: how much of a mean square a step replaces, all of it at first."""
SMALLEST_SQUARE = 1e-30


class Factors(NamedTuple):
    """Of a matrix's squared gradients [..., out, in] the means along rows and along columns."""

    rows: jax.Array
    columns: jax.Array


class State(NamedTuple):
    """`squares` has `Factors` for matrices, and for vectors the mean square itself."""

    steps: jax.Array
    squares: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """The gradient divided by the root of its mean square; each matrix of a stack for itself."""

    def init(trained: Any) -> State:
        return State(jnp.zeros((), jnp.int32), of_leaves(_zeros, trained))

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        count = state.steps + 1
        new = count.astype(jnp.float32) ** FORGETTING

        def one(path: names.Path, grad: jax.Array, old: Any) -> tuple[jax.Array, Any]:
            square = grad * grad + SMALLEST_SQUARE
            now = Factors(square.mean(-1), square.mean(-2)) if isinstance(old, Factors) else square
            squares = jax.tree.map(lambda before, now: (1 - new) * before + new * now, old, now)
            step = grad * _inverse_root(squares)
            own_axes = tuple(range(is_stack(path, grad), grad.ndim))
            rms = jnp.sqrt((step * step).mean(own_axes, keepdims=True))
            return step / jnp.maximum(rms, 1.0), squares

        with_paths, structure = jax.tree_util.tree_flatten_with_path(grads)
        olds = jax.tree.leaves(state.squares, is_leaf=lambda x: isinstance(x, Factors))
        results = [one(names.keys(path), g, old) for (path, g), old in zip(with_paths, olds, strict=True)]
        step, squares = (jax.tree.unflatten(structure, column) for column in zip(*results, strict=True))
        return step, State(count, squares)

    return optax.GradientTransformation(init, update)


def _zeros(path: names.Path, leaf: jax.Array) -> Factors | jax.Array:
    if leaf.ndim - is_stack(path, leaf) < 2:
        return jnp.zeros_like(leaf)
    shape = leaf.shape
    return Factors(jnp.zeros(shape[:-1], leaf.dtype), jnp.zeros((*shape[:-2], shape[-1]), leaf.dtype))


def _inverse_root(squares: Factors | jax.Array) -> jax.Array:
    if not isinstance(squares, Factors):
        return jax.lax.rsqrt(squares)
    relative = squares.rows / squares.rows.mean(-1, keepdims=True)
    return jax.lax.rsqrt(relative)[..., None] * jax.lax.rsqrt(squares.columns)[..., None, :]
