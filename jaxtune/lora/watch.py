"""How much goes into each column of a linear: a leaf `squares` [in] beside an adapter's own, whose gradient is the sum
of the squares of what went in, over all tokens. It changes nothing, and whatever the loss is, that is its gradient."""

import jax
import jax.numpy as jnp


@jax.custom_vjp
def watched(x: jax.Array, squares: jax.Array) -> jax.Array:
    """x [..., in] itself."""
    return x


def _forward(x, squares):
    inputs = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    return x, (inputs * inputs).sum(axis=0)


def _backward(sums, dx):
    return dx, sums


watched.defvjp(_forward, _backward)
