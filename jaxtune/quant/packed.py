"""The protocol of packed arrays: what a frozen weight in fewer bits must be able to do, and the dispatch on it.

A *format* is a small frozen value that says how to pack: `quantize(w)` of a weight [out, in] gives a packed array of
its class. A *packed array* is a pytree that keeps the logical (out, in) and the dtype of the weight it came from as
static fields; leading axes (layers, experts) are free. Everything else (loading, sharding, export, the model's linears)
goes through these, so a further precision is a further class, and nothing else.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np


class Format(Protocol):
    """How to pack a weight. Hashable: programs are compiled for a format."""

    @property
    def name(self) -> str:
        """For people: "NF4 with double quantisation"."""

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8; 16 for weights that stay as they are."""

    def quantize(self, w: jax.Array) -> Any:
        """w [out, in] -> a packed array."""

    def __hash__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Unpacked:
    """The format of weights that stay as they are, in 16 or 32 bits."""

    bits: ClassVar[int] = 16
    name: ClassVar[str] = "16 bits"

    def quantize(self, w: jax.Array) -> jax.Array:
        return w


class PackedArray(abc.ABC):
    """A frozen weight as a pytree of small arrays."""

    out_in: tuple[int, int]
    """The logical (out, in)."""
    dtype: str
    """What dequantising gives: the dtype of the weight it came from."""

    granule: ClassVar[tuple[int, int]] = (1, 1)
    """Of (out, in): what a shard is a multiple of."""

    @property
    @abc.abstractmethod
    def format(self) -> Format:
        """The format that gives arrays like this one."""

    @property
    @abc.abstractmethod
    def leading(self) -> tuple[int, ...]:
        """The axes before (out, in)."""

    @abc.abstractmethod
    def map_axes(self, place: Callable[..., Any]) -> Self:
        """The same tree with `place(*axes)` for each array; axes are "out", "in" or None, leading ones left out."""

    @abc.abstractmethod
    def _dequantize_one(self, dtype: str) -> jax.Array:
        """Without leading axes."""

    @abc.abstractmethod
    def matmul(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out] in the dtype of x; without leading axes. Its residuals are packed arrays."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.leading, *self.out_in)

    @property
    def nbytes(self) -> int:
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def is_cuttable(self) -> bool:
        """Whether shards of it are arrays of the same kind."""
        return True

    def dequantize(self, dtype: Any = None) -> jax.Array:
        name = jnp.dtype(dtype or self.dtype).name
        one = lambda packed: packed._dequantize_one(name)
        for _ in self.leading:
            one = jax.vmap(one)
        return one(self)


def quantize(w: jax.Array, format: Format) -> Any:
    """w [..., out, in] in float32, float16 or bfloat16 -> a packed array of the format."""
    one = format.quantize
    for _ in w.shape[:-2]:
        one = jax.vmap(one)
    return one(w)


def abstract(shape: tuple[int, ...], dtype: Any, format: Format) -> Any:
    """The shapes that `quantize` would give for a weight of this shape."""
    return _abstract(tuple(shape), jnp.dtype(dtype), format)


@functools.lru_cache(maxsize=1024)
def _abstract(shape: tuple[int, ...], dtype: jnp.dtype, format: Format) -> Any:
    """Tracing a quantiser takes 0.1 s, and a model has few shapes."""
    return jax.eval_shape(lambda w: quantize(w, format), jax.ShapeDtypeStruct(shape, dtype))


def matmul(x: jax.Array, w: "PackedArray | jax.Array | np.ndarray") -> jax.Array:
    """x [..., in] @ w[out, in].T -> [..., out], for a packed or a plain weight."""
    if isinstance(w, PackedArray):
        return w.matmul(x)
    return x @ jnp.asarray(w, x.dtype).T


def dequantize(w: "PackedArray | jax.Array", dtype: Any = None) -> jax.Array:
    """The weight as numbers, packed or not."""
    if isinstance(w, PackedArray):
        return w.dequantize(dtype)
    return jnp.asarray(w, dtype)


def _is_packed_array(leaf: Any) -> bool:
    return isinstance(leaf, PackedArray)


def is_packed(tree: Any) -> bool:
    """Whether every weight in the tree is a packed array; what has one axis is none."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_packed_array)
    return all(_is_packed_array(leaf) or leaf.ndim < 2 for leaf in leaves)


def dequantized[Tree](tree: Tree, dtype: Any) -> Tree:
    """The tree with its packed arrays as numbers."""

    def plain(leaf: Any) -> Any:
        return leaf.dequantize(dtype) if _is_packed_array(leaf) else leaf

    return jax.tree.map(plain, tree, is_leaf=_is_packed_array)


def bytes_per_weight(w: PackedArray) -> float:
    return w.nbytes / math.prod(w.shape)
