"""The key/value cache: columns of a fixed number of slots, the same column for every row of the batch.

Each column remembers the segment and position of its token in each row, so that attention needs no other mask.
Arrays are stacked like the layers (`keys[s][p]` is [repeats, B, S, K, D]) and travel in the scan's carry, where
writing one layer's columns copies nothing else.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.models.config import ModelConfig


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "segments_BS", "positions_BS", "used"],
    meta_fields=[],
)
class KVCache:
    """`keys[s][p]`, `values[s][p]`: [repeats, B, S, K, D]; `used`: how many columns hold tokens."""

    def __init__(
        self, keys: Any, values: Any, segments_BS: jax.Array, positions_BS: jax.Array, used: jax.Array
    ):
        self.keys, self.values = keys, values
        self.segments_BS, self.positions_BS, self.used = segments_BS, positions_BS, used

    @classmethod
    def empty(cls, c: ModelConfig, rows: int, columns: int, dtype: Any) -> "KVCache":
        def stacks():
            shape = (rows, columns, c.num_kv_heads, c.head_dim)
            return [
                [jnp.zeros((len(layers) // p, *shape), dtype) for _ in range(p)] for layers, p in c.segments
            ]

        none = jnp.zeros((rows, columns), jnp.int32)
        return cls(stacks(), stacks(), none, none, jnp.zeros((), jnp.int32))

    def add_columns(self, segments_BT: jax.Array, positions_BT: jax.Array) -> "KVCache":
        """The book-keeping of T new columns; each layer writes its own keys and values."""
        start = (0, self.used)
        return KVCache(
            self.keys,
            self.values,
            lax.dynamic_update_slice(self.segments_BS, segments_BT, start),
            lax.dynamic_update_slice(self.positions_BS, positions_BT, start),
            self.used + segments_BT.shape[1],
        )


class LayerCache(NamedTuple):
    """One layer's view of a stack: the whole stack, and which repeat is ours."""

    keys: jax.Array
    values: jax.Array
    repeat: jax.Array

    def write(
        self, k_BTKD: jax.Array, v_BTKD: jax.Array, column: jax.Array
    ) -> tuple["LayerCache", jax.Array, jax.Array]:
        """Puts T columns in place; returns the cache and this layer's keys and values [B, S, K, D]."""

        def put(stack, new):
            zero = jnp.zeros((), column.dtype)
            start = (self.repeat.astype(column.dtype), zero, column, zero, zero)
            return lax.dynamic_update_slice(stack, new[None].astype(stack.dtype), start)

        keys, values = put(self.keys, k_BTKD), put(self.values, v_BTKD)

        def mine(stack):
            return lax.dynamic_index_in_dim(stack, self.repeat, keepdims=False)

        return LayerCache(keys, values, self.repeat), mine(keys), mine(values)
