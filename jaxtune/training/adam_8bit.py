"""Adam whose two moments take a byte a weight each: codes of bitsandbytes' dynamic 8-bit maps, signed for the mean
gradient and unsigned for the mean square, and a float32 absmax for every 256 weights. All arithmetic is float32; a leaf
below 4096 weights keeps its moments in float32.

Blocks run over the flattened leaf, as in bitsandbytes. Where they end with its rows, an absmax lies beside its block
along the last axis, so that the state can be cut as the weight is.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


class State(NamedTuple):
    """`mean` and `square` are trees of the trained tree's structure, of `Packed` or float32 leaves."""

    steps: jax.Array
    mean: Any
    square: Any


def scale_by_adam_8bit(*, beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """mean / (sqrt(square) + epsilon), both corrected for their bias, as torch and bitsandbytes have it: what is new
    enters the update before it is rounded to 8 bits."""

    def init(trained: Any) -> State:
        moments = (jax.tree.map(_zeros, trained) for _ in range(2))  # apart: a step donates both
        return State(jnp.zeros((), jnp.int32), *moments)

    def update(grads: Any, state: State, trained: Any = None) -> tuple[Any, State]:
        count = state.steps + 1
        correction1, correction2 = (
            1 - jnp.float32(beta) ** count.astype(jnp.float32) for beta in (beta1, beta2)
        )

        def one(grad: jax.Array, mean: Any, square: Any) -> tuple[jax.Array, Any, Any]:
            grad = grad.astype(jnp.float32)
            new_mean = beta1 * _unpacked(mean, SIGNED) + (1 - beta1) * grad
            new_square = beta2 * _unpacked(square, UNSIGNED) + (1 - beta2) * grad * grad
            step = (new_mean / correction1) / (jnp.sqrt(new_square / correction2) + epsilon)
            return step, _like(mean, new_mean, SIGNED), _like(square, new_square, UNSIGNED)

        structure = jax.tree.structure(grads)
        leaves = (jax.tree.leaves(tree, is_leaf=_is_packed) for tree in (grads, state.mean, state.square))
        columns = zip(*_one_by_one(one, zip(*leaves, strict=True)), strict=True)
        step, mean, square = (jax.tree.unflatten(structure, column) for column in columns)
        return step, State(count, mean, square)

    return optax.GradientTransformation(init, update)


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


def _one_by_one(function: Callable[..., Any], arguments: Iterable[Any]) -> list[Any]:
    """The function of each, one after the other: left to itself XLA may begin all, with every moment in float32."""
    results: list[Any] = []
    for each in arguments:
        if results:
            each, results[-1] = lax.optimization_barrier((each, results[-1]))
        results.append(function(*each))
    return results


def _is_packed(moment: Any) -> bool:
    return isinstance(moment, Packed)


def _zeros(leaf: jax.Array) -> Packed | jax.Array:
    if leaf.size < SMALLEST:
        return jnp.zeros_like(leaf, jnp.float32)
    codes = jnp.zeros_like(leaf, jnp.uint8)
    return Packed(codes, jnp.zeros(jax.eval_shape(_blocks, codes).shape[:-1], jnp.float32))


def _unpacked(moment: Packed | jax.Array, codes_of: Map) -> jax.Array:
    return unpack(moment, codes_of) if isinstance(moment, Packed) else moment


def _like(old: Packed | jax.Array, new: jax.Array, codes_of: Map) -> Packed | jax.Array:
    return pack(new, codes_of) if isinstance(old, Packed) else new


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
