"""NEFTune: embeddings with uniform noise, so that a model learns less by heart."""

import jax
import jax.numpy as jnp


def noise(key: jax.Array, segments_BT: jax.Array, width: int, alpha: float) -> jax.Array:
    """[B, T, M] within alpha / sqrt(L M) of 0, float32. L is how many tokens a token's own sample has, so that noise
    does not depend on what lies beside it in a row; of a batch of one length it is what transformers takes."""
    of_row = lambda row_T: jnp.zeros(row_T.size + 1, jnp.int32).at[row_T].add(1)[row_T]
    length_BT = jax.vmap(of_row)(segments_BT).astype(jnp.float32)
    most_BT1 = alpha / jnp.sqrt(length_BT * width)[..., None]
    return most_BT1 * jax.random.uniform(key, (*segments_BT.shape, width), jnp.float32, -1.0, 1.0)
