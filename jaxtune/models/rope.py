"""Rotary position embeddings: frequencies from the config (float32, as transformers computes them), and the turn."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position, float32 [head_dim / 2]."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    if rope.kind == "default":
        return plain
    # Llama 3: long wavelengths are slowed by `factor`, short ones kept, those between blended.
    wavelength = 2 * math.pi / plain
    short, long = (rope.original_max_position / f for f in (rope.high_freq_factor, rope.low_freq_factor))
    kept = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept) * plain / rope.factor + kept * plain
    scaled = np.where(wavelength > long, plain / rope.factor, np.where(wavelength < short, plain, blended))
    return scaled.astype(np.float32)


def tables(positions_BT: jax.Array, inverse: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, head_dim / 2]: one for all heads."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * inverse[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BTHD: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + D/2) of every head, in float32."""
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHD.dtype)
