"""NF4Array: a frozen 4-bit weight as a pytree. Leading axes are free (layers, experts), the last two are packed."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.kernels import nf4


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["out_in", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class NF4Array:
    """`out_in` is the logical (out, in); `dtype` is what dequantising gives, the dtype of the weight it came from."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array
    offset: jax.Array
    out_in: tuple[int, int]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.offset.shape, *self.out_in)

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def packed(self) -> nf4.Packed:
        return nf4.Packed(self.codes, self.absmax, self.nested_absmax, self.offset)

    def dequantize(self, dtype: Any = None) -> jax.Array:
        one = functools.partial(nf4.dequantize, shape=self.out_in, dtype=dtype or self.dtype)
        for _ in self.offset.shape:
            one = jax.vmap(one)
        return one(self.packed)


def quantize(w: jax.Array) -> NF4Array:
    """w [..., out, in] in float32, float16 or bfloat16 -> NF4Array."""
    one = nf4.quantize
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return NF4Array(*one(w), out_in=(w.shape[-2], w.shape[-1]), dtype=w.dtype.name)


def abstract(shape: tuple[int, ...], dtype: Any) -> NF4Array:
    """The shapes that `quantize` would give for a weight of this shape."""
    return jax.eval_shape(quantize, jax.ShapeDtypeStruct(shape, dtype))


def bytes_per_weight(w: NF4Array) -> float:
    return w.nbytes / math.prod(w.shape)


def matmul(x: jax.Array, w: "NF4Array | jax.Array | np.ndarray") -> jax.Array:
    """x [..., in] @ w[out, in].T -> [..., out], for a packed or a plain weight."""
    if isinstance(w, NF4Array):
        return nf4.matmul(x, w.packed, w.out_in)
    return x @ jnp.asarray(w, x.dtype).T
