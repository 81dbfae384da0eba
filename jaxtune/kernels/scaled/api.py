"""Products with 8-bit weights that keep only packed residuals, as `kernels.nf4` does for 4 bits.

A weight [out, in] is `codes` in int8 or float8 and `scales` [R, C], one for every block of ceil(out / R) x ceil(in / C)
codes: one column of scales is row-wise, 1 x 1 is one for the whole matrix. Packed weights are frozen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.kernels.choice import Candidates, choose
from jaxtune.kernels.scaled import reference

NAME = "scaled_matmul"
IMPLEMENTATIONS: Candidates = {"xla": None}


class Scaled(NamedTuple):
    codes: jax.Array
    scales: jax.Array


def quantize(w_NK: jax.Array, *, dtype: Any, block: tuple[int | None, int | None]) -> Scaled:
    """w [out, in] -> codes in `dtype` and scales; None in `block` is the whole axis."""
    return Scaled(*reference.quantize(w_NK, dtype=jnp.dtype(dtype), block=block))


def dequantize(packed: Scaled, *, dtype: Any) -> jax.Array:
    return reference.dequantize(*packed, dtype=jnp.dtype(dtype))


def matmul(x: jax.Array, packed: Scaled, *, implementation: str | None = None) -> jax.Array:
    """x [..., in] times a packed weight [out, in] -> [..., out], in the dtype of x."""
    choose(NAME, implementation, IMPLEMENTATIONS)
    return _matmul(x, packed)


@jax.custom_vjp
def _matmul(x, packed):
    return x @ dequantize(packed, dtype=x.dtype).T


def _matmul_fwd(x, packed):
    return _matmul(x, packed), packed


def _matmul_bwd(packed, dy):
    return dy @ dequantize(packed, dtype=dy.dtype), None


_matmul.defvjp(_matmul_fwd, _matmul_bwd)
