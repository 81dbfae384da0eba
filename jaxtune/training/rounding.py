"""Sums that are kept in 16 bits. Rounded to the nearest, a bfloat16 weight of 0.02 ignores any step below 3e-5, which
is most of those that fine-tuning makes; rounded by chance, up as often as what is lost says, the steps add up."""

from typing import Any

import jax
import jax.numpy as jnp


def add_rounded(tree: Any, updates: Any, key: jax.Array) -> Any:
    """tree + updates (float32), in the tree's own dtypes: bfloat16 rounded by chance, others to the nearest."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def add(leaf: jax.Array, update: jax.Array, key: jax.Array) -> jax.Array:
        total = leaf.astype(jnp.float32) + update
        return _by_chance(total, key) if leaf.dtype == jnp.bfloat16 else total.astype(leaf.dtype)

    return jax.tree.map(add, tree, updates, keys)


def _by_chance(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 -> bfloat16, its upper half: noise as wide as the lower half carries into it as often as it should."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = ((bits + noise) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
