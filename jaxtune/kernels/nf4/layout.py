"""NF4's and FP4's constants and the order of nibbles: the 16 values, the 256-entry map of double-quantised scales, and
how codes are packed into bytes. Blocks of 64 weights share a scale, as in bitsandbytes, whatever the order.

planar  input size a multiple of 64: byte j of a 128-wide tile holds input j (low nibble) and input 64 + j (high), so
        each nibble plane has one scale. An odd number of blocks is padded with the code of zero.
flat    any other input size: blocks cross rows; bitsandbytes' own order, even elements in the high nibble.
"""

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 64
"""Weights that share one scale."""
GROUP = 256
"""Scales that share one second-level scale."""

VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
FP4_VALUES = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3, 0, -1 / 16, -8, -12, -4, -6, -2, -3], np.float32) / 12
"""A sign, two bits of exponent and one of mantissa, divided by the largest; code 8 is a second zero."""
TABLES: dict[str, np.ndarray] = {"nf4": VALUES, "fp4": FP4_VALUES}
"""Code -> value, by bitsandbytes' name of the type."""
ZERO_CODES = {"nf4": 7, "fp4": 0}


def _dynamic_map(*, signed: bool) -> np.ndarray:
    """A dynamic 8-bit map: for every exponent -6..0 the midpoints of 2^i equal parts of [0.1, 1], both signs, and 0 and
    1; unsigned, of twice as many parts. float32 throughout; the second half of each linspace counts from its end, with
    one rounding per point (a fused multiply-add), as torch computes it: the entries are bit-equal to bitsandbytes'."""
    positive = []
    for i in range(7):
        parts = 2**i if signed else 2 ** (i + 1)
        step = (np.float32(1) - np.float32(0.1)) / np.float32(parts)
        k = np.arange(parts + 1, dtype=np.float64)
        from_start = np.float64(np.float32(0.1)) + np.float64(step) * k
        from_end = 1.0 - np.float64(step) * (parts - k)
        edges = np.where(k < (parts + 1) // 2, from_start, from_end).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (i - 6)) * middles)
    entries = np.concatenate(positive)
    negative = -entries if signed else entries[:0]
    return np.sort(np.concatenate([entries, negative, np.array([0, 1], np.float32)]))


DYNAMIC_MAP = _dynamic_map(signed=True)
UNSIGNED_DYNAMIC_MAP = _dynamic_map(signed=False)


def is_planar(shape: tuple[int, int]) -> bool:
    return shape[1] % BLOCK == 0


def pack(codes: jax.Array, zero: int = ZERO_CODES["nf4"]) -> jax.Array:
    """codes uint8 [out, in] in 0..15 -> packed bytes: [out, bytes] planar, or [bytes] flat."""
    out, inn = codes.shape
    if not is_planar((out, inn)):
        flat = jnp.pad(codes.reshape(-1), (0, codes.size % 2))
        return flat[0::2] << 4 | flat[1::2]
    padding = inn % (2 * BLOCK)
    tiles = jnp.pad(codes, ((0, 0), (0, padding)), constant_values=zero).reshape(out, -1, 2, BLOCK)
    return (tiles[:, :, 0] | tiles[:, :, 1] << 4).reshape(out, -1)


def unpack(packed: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `pack`: uint8 codes [blocks per row or in all, 64], the padding still in place when flat.

    planar: [out, in / 64, 64]; flat: [ceil(out * in / 64), 64]."""
    out, inn = shape
    if not is_planar(shape):
        codes = jnp.stack([packed >> 4, packed & 15], axis=-1).reshape(-1)[: out * inn]
        return jnp.pad(codes, (0, -codes.size % BLOCK)).reshape(-1, BLOCK)
    byte = packed.reshape(out, -1, 1, BLOCK)
    planes = jnp.concatenate([byte & 15, byte >> 4], axis=2).reshape(out, -1, BLOCK)
    return planes[:, : inn // BLOCK]


def from_bitsandbytes(flat: jax.Array, shape: tuple[int, int], zero: int) -> jax.Array:
    """bitsandbytes' bytes [ceil(out * in / 2)] -> the same codes in our order."""
    if not is_planar(shape):
        return flat
    return pack(jnp.stack([flat >> 4, flat & 15], axis=-1).reshape(shape), zero)


def to_bitsandbytes(packed: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """The inverse of `from_bitsandbytes`."""
    if not is_planar(shape):
        return packed
    pairs = unpack(packed, shape).reshape(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]
