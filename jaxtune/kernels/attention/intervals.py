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

    def blocks(self, queries: int, keys: int) -> jax.Array:
        """[N / queries, 4], of so many queries each: the first block of `keys` that any of them sees, from where on and
        until where all of them see all of it, and where what they see ends."""
        first = self.first.reshape(-1, queries)
        at = jnp.arange(len(first)) * queries
        diagonal = at // keys
        begin = jnp.minimum(first[:, 0] // keys, diagonal)
        whole = jnp.clip(-(-first[:, -1] // keys), begin, diagonal)
        return _table(begin, whole, diagonal, -(-(at + queries) // keys))

    def blocks_by(self, keys: int, queries: int) -> jax.Array:
        """[N / keys, 4], of so many keys each: the same, of the blocks of `queries` that see them."""
        first = self.first.reshape(-1, queries)
        at = jnp.arange(self.first.size // keys) * keys
        below = -(-(at + keys) // queries)
        # (By its default method, a search is a loop of ten small kernels.)
        no_later = functools.partial(jnp.searchsorted, side="right", method="compare_all")
        whole = jnp.maximum(no_later(first[:, -1], at), below)
        end = jnp.maximum(no_later(first[:, 0], at + keys - 1), whole)
        return _table(at // queries, below, whole, end)


def _table(*columns: jax.Array) -> jax.Array:
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def intervals(segments_BT: jax.Array, window: int | None) -> Intervals:
    """Of rows of segments, each in one stretch; 0 is padding, which sees nothing."""
    N = segments_BT.size
    token = jnp.arange(N, dtype=jnp.int32)
    begins_BT = jnp.diff(segments_BT, axis=1, prepend=-1) != 0
    first = lax.cummax(jnp.where(begins_BT.reshape(-1), token, 0))
    if window is not None:
        first = jnp.maximum(first, token - (window - 1))
    return Intervals(jnp.where(segments_BT.reshape(-1) == 0, token + 1, first))
