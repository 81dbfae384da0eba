"""Muon: the mean gradient of a matrix with its singular values made alike, by Newton and Schulz's iteration.

With torch's defaults. Its iteration is in bfloat16; here it is in float32, since an adapter's matrices are narrow."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


class State(NamedTuple):
    mean: Any


def scale_by_muon() -> optax.GradientTransformation:
    """Of leaves [..., out, in], each matrix for itself; tall ones get a longer step, so that outputs move alike."""

    def init(trained: Any) -> State:
        return State(jax.tree.map(jnp.zeros_like, trained))

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        mix = lambda before, now: MOMENTUM * before + (1 - MOMENTUM) * now
        mean = jax.tree.map(mix, state.mean, grads)
        ahead = jax.tree.map(mix, mean, grads)  # Nesterov's: where the mean is going
        return jax.tree.map(lambda m: orthogonal(m) * _lengthened(m.shape), ahead), State(mean)

    return optax.GradientTransformation(init, update)


def orthogonal(matrices: jax.Array) -> jax.Array:
    """U V^T of [..., out, in] = U S V^T, roughly: singular values come out between 0.5 and 1.5."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True), EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


def _lengthened(shape: tuple[int, ...]) -> float:
    return math.sqrt(max(1.0, shape[-2] / shape[-1]))
