"""Rotary position embeddings: frequencies from the config (float32, as transformers computes them), and the turn.

`dynamic` and `longrope` depend on the length of the sequence in transformers. Here they depend on the length that the
model is set up for, `RopeConfig.length`, which `models/context.py` takes from `max_seq_length`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.models.config import RopeConfig


def frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position, float32 [turned dimensions / 2]."""
    dim = head_dim if rope.dim is None else rope.dim
    plain = _plain(rope.theta, dim)
    match rope.kind:
        case "default":
            return plain
        case "linear":
            return plain / np.float32(rope.factor)
        case "dynamic":
            # The base grows with the length, so that the longest wavelength is stretched as `linear` would.
            excess = max(rope.length, rope.original_max_position) / rope.original_max_position
            stretch = rope.factor * excess - (rope.factor - 1)
            return _plain(rope.theta * stretch ** (dim / (dim - 2)), dim)
        case "llama3":
            return _llama3(rope, plain)
        case "yarn":
            return _yarn(rope, plain, dim)
        case "longrope":
            beyond = rope.length > rope.original_max_position
            divisors = rope.long_divisors if beyond else rope.short_divisors
            return plain / np.asarray(divisors, np.float32)


def _plain(theta: float, dim: int) -> np.ndarray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.float32(1) / np.power(np.float32(theta), exponents, dtype=np.float32)


def _llama3(rope: RopeConfig, plain: np.ndarray) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / plain
    short, long = (rope.original_max_position / f for f in (rope.high_freq_factor, rope.low_freq_factor))
    kept = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - kept) * plain / rope.factor + kept * plain
    scaled = np.where(wavelength > long, plain / rope.factor, np.where(wavelength < short, plain, blended))
    return scaled.astype(np.float32)


def _yarn(rope: RopeConfig, plain: np.ndarray, dim: int) -> np.ndarray:
    """Dimensions that turn often within the original length are kept, those that turn seldom slowed by `factor`, and
    between the two the share of the slowed one grows linearly with the dimension."""

    def dimension(turns):
        return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first or 0.001
    slowed = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(width), 0, 1)
    return (plain / np.float32(rope.factor) * slowed + plain * (1 - slowed)).astype(np.float32)


def tables(
    positions_BT: jax.Array, inverse: np.ndarray, attention_factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, T, 1, turned dimensions / 2]: one for all heads."""
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * inverse[None, None, None, :]
    return jnp.cos(angles) * attention_factor, jnp.sin(angles) * attention_factor


def rotate(x_BTHD: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + R/2) of the first R numbers of every head, in float32; the others stay as they are."""
    R = 2 * cos.shape[-1]
    first, second = jnp.split(x_BTHD[..., :R].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTHD.dtype), x_BTHD[..., R:]], axis=-1)
