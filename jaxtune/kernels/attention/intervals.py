"""Which keys a query sees, of the tokens of all rows laid end to end: those from its `first` up to itself. Segments,
with or without a window, are of this form, and `first` never falls from one token to the next, so that what a block of
queries sees, and what sees a block of keys, is a range of blocks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Intervals(NamedTuple):
    first: jax.Array
    """[N] int32: the first key that the query sees; behind itself, where it sees none."""

    def blocks(self, tile: int, keys: int) -> jax.Array:
        """[N / tile, 2] of `tile` queries: the first block of `keys` that any of them sees, and the first that all of
        them see all of, or the first of the tile's own if there is none."""
        per_tile = self.first.reshape(-1, tile)
        own = jnp.arange(len(per_tile)) * (tile // keys)
        begin = jnp.minimum(per_tile[:, 0] // keys, own)
        full = jnp.clip(-(-per_tile[:, -1] // keys), begin, own)
        return jnp.stack([begin, full], axis=1).astype(jnp.int32)

    def blocks_by(self, tile: int, queries: int) -> jax.Array:
        """[N / tile, 2] of `tile` keys, from the tile's end on: the first block of `queries` of which not all see all
        of them, and the first of which none sees any."""
        per_block = self.first.reshape(-1, queries)
        keys = jnp.arange(self.first.size // tile) * tile
        own = (keys + tile) // queries
        # (By its default method, a search is a loop of ten small kernels.)
        no_later = functools.partial(jnp.searchsorted, side="right", method="compare_all")
        full = jnp.maximum(no_later(per_block[:, -1], keys), own)
        end = jnp.maximum(no_later(per_block[:, 0], keys + tile - 1), full)
        return jnp.stack([full, end], axis=1).astype(jnp.int32)


def intervals(segments_BT: jax.Array, window: int | None) -> Intervals:
    """Of rows of segments, each in one stretch; 0 is padding, which sees nothing."""
    N = segments_BT.size
    token = jnp.arange(N, dtype=jnp.int32)
    begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    first = lax.cummax(jnp.where(begins_BT.reshape(-1), token, 0))
    if window is not None:
        first = jnp.maximum(first, token - (window - 1))
    return Intervals(jnp.where(segments_BT.reshape(-1) == 0, token + 1, first))
