"""NF4 products that keep only packed residuals.

`matmul(x, packed...)` is `x @ dequantize(packed).T`. Differentiating "dequantise, then multiply" would keep a 16-bit
copy of the weight until the backward pass; here the residuals are the packed arrays themselves, dequantised again
when the gradient needs them. Packed weights are frozen: their cotangent is None.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels.choice import Candidates, choose
from jaxtune.kernels.nf4 import reference

NAME = "nf4_matmul"
IMPLEMENTATIONS: Candidates = {"xla": None}


class Packed(NamedTuple):
    """The arrays of one NF4 weight [out, in]; see `layout.py` for their shapes."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array
    offset: jax.Array


def quantize(w_NK: jax.Array) -> Packed:
    return Packed(*reference.quantize(w_NK))


def dequantize(packed: Packed, *, shape: tuple[int, int], dtype: Any) -> jax.Array:
    return reference.dequantize(*packed, shape=shape, dtype=jnp.dtype(dtype))


def matmul(
    x: jax.Array, packed: Packed, shape: tuple[int, int], *, implementation: str | None = None
) -> jax.Array:
    """x [..., in] times an NF4 weight of `shape` (out, in) -> [..., out], in the dtype of x."""
    choose(NAME, implementation, IMPLEMENTATIONS)
    return _matmul(x, packed, shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x, packed, shape):
    return x @ dequantize(packed, shape=shape, dtype=x.dtype).T


def _matmul_fwd(x, packed, shape):
    return _matmul(x, packed, shape), packed


def _matmul_bwd(shape, packed, dy):
    return dy @ dequantize(packed, shape=shape, dtype=dy.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
