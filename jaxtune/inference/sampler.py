"""From logits to the next token: greedy, or by temperature."""

import jax
import jax.numpy as jnp


def sample(logits_BV: jax.Array, key: jax.Array, temperature: float | jax.Array, greedy: bool) -> jax.Array:
    """Token ids int32 [B]. Greedy takes the first of equal logits, as torch does on CPU."""
    if greedy:
        return logits_BV.argmax(axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature, axis=-1).astype(jnp.int32)
