"""Moments that take a byte a weight: codes of bitsandbytes' dynamic 8-bit maps, signed for a mean gradient and unsigned
for a mean square, and a float32 absmax for every 256 weights. All arithmetic is float32; a leaf below 4096 weights
keeps its moments in float32.

Blocks run over the flattened leaf, as in bitsandbytes. Where they end with its rows, an absmax lies beside its block
along the last axis, so that the state can be cut as the weight is.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.kernels.nf4.layout import DYNAMIC_MAP, UNSIGNED_DYNAMIC_MAP

BLOCK = 256
"""Weights that share one absmax."""
SMALLEST = 4096
"""Leaves with fewer weights are not worth a loss of precision."""


class Packed(NamedTuple):
    """A moment in 8 bits."""

    codes: jax.Array
    """uint8, in the shape of the leaf."""
    absmax: jax.Array
    """float32 [..., in / 256]; [ceil(size / 256)] where blocks cross rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Map:
    """256 rising values. With the number of a value growing as it does, the nearest one is found without a search."""

    values: np.ndarray
    parts: tuple[int, ...]
    """Equal parts of each decade from 10^-6 up; a value lies in the middle of each."""
    zero: int
    """The code of 0."""

    @property
    def edges(self) -> np.ndarray:
        """[255]: the last float32 that is nearer to the lower of two neighbours, or as near."""
        middles = (self.values[:-1].astype(np.float64) + self.values[1:]) / 2
        rounded = middles.astype(np.float32)
        return np.where(rounded > middles, np.nextafter(rounded, np.float32(-2)), rounded)

    @property
    def lines(self) -> list[tuple[float, float]]:
        """(slope, start): how many values lie below x, less a half, as a line for each decade. Decades get less dense
        upward: of all lines the lowest is the one that holds."""
        starts = 1 + np.cumsum((0, *self.parts[:-1]))
        decades = 10.0 ** np.arange(6, -1, -1)
        return [
            (count * decade / 0.9, start - count / 9 - 0.5)
            for count, decade, start in zip(self.parts, decades, starts, strict=True)
        ]

    def decode(self, codes: jax.Array) -> jax.Array:
        return _look_up(self.values, codes)

    def encode(self, x: jax.Array) -> jax.Array:
        """x in [-1, 1] -> the code of the nearest value, ties to the lower one.

        The lines are right or one too low, whatever x (a value is off their grid by a fifth where decades meet, by a
        quarter at 1): comparing with one edge decides."""
        size = jnp.abs(x)
        rank = jnp.stack([slope * size + start for slope, start in self.lines]).min(0).astype(jnp.int32)
        lower = jnp.where(x > 0, self.zero + rank, self.zero - 1 - rank)
        lower = jnp.clip(lower, 0, 254)
        return (lower + (x > _look_up(self.edges, lower)).astype(jnp.int32)).astype(jnp.uint8)


SIGNED = Map(DYNAMIC_MAP, tuple(2**i for i in range(7)), zero=127)
UNSIGNED = Map(UNSIGNED_DYNAMIC_MAP, tuple(2 ** (i + 1) for i in range(7)), zero=0)


def pack(x: jax.Array, codes_of: Map) -> Packed:
    """float32 of any shape -> 8 bits."""
    blocks = _blocks(x)
    absmax = jnp.abs(blocks).max(-1)
    inverse = 1 / jnp.maximum(absmax, jnp.finfo(jnp.float32).tiny)
    scaled = jnp.clip(blocks * inverse[..., None], -1, 1)
    return Packed(_whole(codes_of.encode(scaled), x.shape), absmax)


def unpack(packed: Packed, codes_of: Map) -> jax.Array:
    """8 bits -> float32, in the shape that was packed."""
    values = codes_of.decode(_blocks(packed.codes)) * packed.absmax[..., None]
    return _whole(values, packed.codes.shape)


def zeros(trained: Any) -> Any:
    """A moment before the first step, for each leaf of the tree: `Packed`, or float32 where a leaf is small."""

    def of(leaf: jax.Array) -> Packed | jax.Array:
        if leaf.size < SMALLEST:
            return jnp.zeros_like(leaf, jnp.float32)
        codes = jnp.zeros_like(leaf, jnp.uint8)
        return Packed(codes, jnp.zeros(jax.eval_shape(_blocks, codes).shape[:-1], jnp.float32))

    return jax.tree.map(of, trained)


def unpacked(moment: Packed | jax.Array, codes_of: Map) -> jax.Array:
    return unpack(moment, codes_of) if isinstance(moment, Packed) else moment


def packed_like(old: Packed | jax.Array, new: jax.Array, codes_of: Map) -> Packed | jax.Array:
    return pack(new, codes_of) if isinstance(old, Packed) else new


def map_one_by_one(function: Callable[..., tuple], grads: Any, *moments: Any) -> tuple:
    """The function of each leaf's gradient (in float32) and moments; one tree for each thing that it returns. Leaves go
    one after the other: left to itself XLA may begin all, with every moment in float32."""
    is_packed = lambda moment: isinstance(moment, Packed)
    leaves = (jax.tree.leaves(tree, is_leaf=is_packed) for tree in (grads, *moments))
    results: list[tuple] = []
    for each in zip(*leaves, strict=True):
        if results:
            each, results[-1] = lax.optimization_barrier((each, results[-1]))
        grad, *own = each
        results.append(function(grad.astype(jnp.float32), *own))
    structure = jax.tree.structure(grads)
    return tuple(jax.tree.unflatten(structure, column) for column in zip(*results, strict=True))


def _blocks(x: jax.Array) -> jax.Array:
    """[..., 256], the last block of a flat leaf filled up with zeros."""
    if x.ndim and x.shape[-1] % BLOCK == 0:
        return x.reshape(*x.shape[:-1], -1, BLOCK)
    flat = x.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % BLOCK)).reshape(-1, BLOCK)


def _whole(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `_blocks`."""
    if shape[-1] % BLOCK == 0:
        return blocks.reshape(shape)
    return blocks.reshape(-1)[: np.prod(shape)].reshape(shape)


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds")
