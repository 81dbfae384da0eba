"""NF4 and FP4 products that keep only packed residuals.

`matmul(x, packed...)` is `x @ dequantize(packed).T`. Differentiating "dequantise, then multiply" would keep a 16-bit
copy of the weight until the backward pass; here the residuals are the packed arrays themselves, dequantised again
when the gradient needs them. Packed weights are frozen: their cotangent is None.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels import gpu
from jaxtune.kernels.choice import Candidates, choose
from jaxtune.kernels.nf4 import mosaic_gpu, reference

NAME = "nf4_matmul"
IMPLEMENTATIONS: Candidates = {"mosaic_gpu": gpu.why_not_mosaic, "xla": None}
"""Of dequantising, by what the machine has; a case may ask for more. The product is always XLA's."""


class Packed(NamedTuple):
    """The arrays of one 4-bit weight [out, in]; see `layout.py` for their shapes. Plain scales have no second level."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None = None
    offset: jax.Array | None = None


def quantize(w_NK: jax.Array, *, values: str = "nf4", double: bool = True) -> Packed:
    """`values` is "nf4" or "fp4"; `double` quantises the scales too."""
    return Packed(*reference.quantize(w_NK, values=values, double=double))


def dequantize(
    packed: Packed,
    *,
    shape: tuple[int, int],
    dtype: Any,
    values: str = "nf4",
    implementation: str | None = None,
) -> jax.Array:
    """The weight of `shape` (out, in): the same bits by every implementation (see `kernels.choice`)."""
    dtype = jnp.dtype(dtype)
    why_not = lambda: gpu.why_not_mosaic() or mosaic_gpu.why_not(shape, dtype, packed.offset is not None)
    if choose(NAME, implementation, {**IMPLEMENTATIONS, "mosaic_gpu": why_not}) == "mosaic_gpu":
        stack_of_one = jax.tree.map(lambda array: array[None], packed)
        return mosaic_gpu.dequantize_layer(stack_of_one, 0, shape=shape, dtype=dtype, values=values)
    return reference.dequantize(*packed, shape=shape, dtype=dtype, values=values)


def matmul(
    x: jax.Array,
    packed: Packed,
    shape: tuple[int, int],
    *,
    values: str = "nf4",
    implementation: str | None = None,
) -> jax.Array:
    """x [..., in] times a 4-bit weight of `shape` (out, in) -> [..., out], in the dtype of x."""
    return _matmul(x, packed, shape, values, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul(x, packed, shape, values, implementation):
    return x @ _weight(x, packed, shape, values, implementation).T


def _matmul_fwd(x, packed, shape, values, implementation):
    return _matmul(x, packed, shape, values, implementation), packed


def _matmul_bwd(shape, values, implementation, packed, dy):
    return dy @ _weight(dy, packed, shape, values, implementation), None


def _weight(like, packed, shape, values, implementation):
    return dequantize(packed, shape=shape, dtype=like.dtype, values=values, implementation=implementation)


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
