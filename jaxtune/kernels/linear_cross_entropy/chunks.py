"""The tokens that have a label, a chunk at a time; what the others hold is never looked at.

Their number is known only when the program runs, and with it how often a loop turns. Such a loop cannot be
differentiated in reverse, and need not be: gradients are made inside it.

Shapes: T tokens, C in a chunk, P = T in whole chunks. "Packed" [P, ...] has the labelled tokens' rows first, in order.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

IGNORE = -100

BUDGET = 512 * 2**20
"""Bytes that a chunk's logits may take in float32: 1024 tokens at a vocabulary of 128,256."""

TILE = 128
"""A default chunk is a multiple of this, and no less, so that its products are in whole tiles."""

NOWHERE = 2**31 - 1  # a place that no array has


def chunk_size(T: int, V: int, chunk: int | None = None) -> int:
    """At most `chunk` tokens, or what BUDGET allows; fewer where as few chunks can then be fuller."""
    most = chunk or max(TILE, BUDGET // (4 * V) // TILE * TILE)
    evenly = math.ceil(T / math.ceil(T / most))
    return min(most, T, math.ceil(evenly / TILE) * TILE)


def map_labelled(function: Callable, chunk: int, tree_T: Any, labels_T: jax.Array) -> Any:
    """`function(tree_C, labels_C)` over the chunks, results packed: see `unpack`."""
    of_chunk, number, P = _chunks(function, chunk, tree_T, labels_T)
    put = lambda i: lambda all_P, each_C: lax.dynamic_update_slice_in_dim(all_P, each_C, i * chunk, axis=0)
    zeros = jax.tree.map(lambda x: lax.full_like(x, 0, shape=(P, *x.shape[1:])), jax.eval_shape(of_chunk, 0))
    return lax.fori_loop(0, number, lambda i, packed: jax.tree.map(put(i), packed, of_chunk(i)), zeros)


def sum_labelled(function: Callable, chunk: int, tree_T: Any, labels_T: jax.Array) -> Any:
    """The sum of `function(tree_C, labels_C)` over the chunks, one chunk's result alive at a time."""
    of_chunk, number, _ = _chunks(function, chunk, tree_T, labels_T)
    zeros = jax.tree.map(lambda x: lax.full_like(x, 0), jax.eval_shape(of_chunk, 0))
    return lax.fori_loop(0, number, lambda i, total: jax.tree.map(jnp.add, total, of_chunk(i)), zeros)


def unpack(packed: Any, labels_T: jax.Array) -> Any:
    """Each labelled token's row where the token is, [T, ...]; zeros at the others."""
    labelled_T = labels_T >= 0
    places_T = jnp.where(labelled_T, jnp.cumsum(labelled_T, dtype=jnp.int32) - 1, NOWHERE)
    return _rows(packed, places_T, 0)


def _chunks(
    function: Callable, chunk: int, tree_T: Any, labels_T: jax.Array
) -> tuple[Callable, jax.Array, int]:
    """(i -> `function` of chunk i, how many chunks have a labelled token, P). What the last one lacks of C tokens is
    zeros with the label IGNORE."""
    P = math.ceil(labels_T.size / chunk) * chunk
    labelled_T = labels_T >= 0
    places_P = jnp.nonzero(labelled_T, size=P, fill_value=NOWHERE)[0]

    def of_chunk(i):
        places_C = lax.dynamic_slice_in_dim(places_P, i * chunk, chunk)
        return function(_rows(tree_T, places_C, 0), _rows(labels_T, places_C, IGNORE))

    return of_chunk, -(-labelled_T.sum(dtype=jnp.int32) // chunk), P


def _rows(tree: Any, places: jax.Array, beyond: int) -> Any:
    """Rows of each array of a tree; `beyond` in those that it does not have."""
    return jax.tree.map(lambda x: x.at[places].get(mode="fill", fill_value=beyond), tree)
