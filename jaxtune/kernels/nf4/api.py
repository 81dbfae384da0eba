"""NF4 and FP4 products that keep only packed residuals.

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
    """The arrays of one 4-bit weight [out, in]; see `layout.py` for their shapes. Plain scales have no second level."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    offset: jax.Array | None = None


def quantize(w_NK: jax.Array, *, values: str = "nf4", double: bool = True) -> Packed:
    """`values` is "nf4" or "fp4"; `double` quantises the scales too."""
    return Packed(*reference.quantize(w_NK, values=values, double=double))


def dequantize(packed: Packed, *, shape: tuple[int, int], dtype: Any, values: str = "nf4") -> jax.Array:
    return reference.dequantize(*packed, shape=shape, dtype=jnp.dtype(dtype), values=values)


def matmul(
    x: jax.Array,
    packed: Packed,
    shape: tuple[int, int],
    *,
    values: str = "nf4",
    implementation: str | None = None,
) -> jax.Array:
    """x [..., in] times a 4-bit weight of `shape` (out, in) -> [..., out], in the dtype of x."""
    choose(NAME, implementation, IMPLEMENTATIONS)
    return _matmul(x, packed, shape, values)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, packed, shape, values):
    return x @ dequantize(packed, shape=shape, dtype=x.dtype, values=values).T


def _matmul_fwd(x, packed, shape, values):
    return _matmul(x, packed, shape, values), packed


def _matmul_bwd(shape, values, packed, dy):
    return dy @ dequantize(packed, shape=shape, dtype=dy.dtype, values=values), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
