"""8-bit weights: int8 with one scale a row, float8 with one a row or a block. Activations stay in 16 bits."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxtune.kernels import scaled
from jaxtune.quant.packed import Format, PackedArray

_register = functools.partial(
    jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["out_in", "dtype"]
)


@dataclasses.dataclass(frozen=True)
class Int8:
    """The format of bitsandbytes' LLM.int8() weights: absmax of each row."""

    bits: ClassVar[int] = 8
    name: ClassVar[str] = "int8"

    def quantize(self, w: jax.Array) -> "Int8Array":
        packed = scaled.quantize(w, dtype=jnp.int8, block=(1, None))
        return Int8Array(*packed, out_in=(w.shape[0], w.shape[1]), dtype=w.dtype.name)


@dataclasses.dataclass(frozen=True)
class Float8:
    """The format of e4m3 checkpoints; `block` is None for a scale a row, 128 for one a tile of 128 x 128."""

    block: int | None = None
    bits: ClassVar[int] = 8

    @property
    def name(self) -> str:
        return "float8" if self.block is None else f"float8 in blocks of {self.block}"

    def quantize(self, w: jax.Array) -> "Float8Array":
        block = (1, None) if self.block is None else (self.block, self.block)
        packed = scaled.quantize(w, dtype=jnp.float8_e4m3fn, block=block)
        return Float8Array(*packed, out_in=(w.shape[0], w.shape[1]), dtype=w.dtype.name)


@dataclasses.dataclass(frozen=True)
class EightBitArray(PackedArray):
    """Codes [..., out, in] and scales [..., R, C]; see `kernels/scaled`."""

    codes: jax.Array
    scales: jax.Array
    out_in: tuple[int, int]
    dtype: str

    @property
    def leading(self) -> tuple[int, ...]:
        return self.codes.shape[:-2]

    @property
    def packed(self) -> scaled.Scaled:
        return scaled.Scaled(self.codes, self.scales)

    def map_axes(self, place: Callable[..., Any]) -> Self:
        axes = (
            axis if parts > 1 else None
            for axis, parts in zip(("out", "in"), self.scales.shape[-2:], strict=True)
        )
        return type(self)(place("out", "in"), place(*axes), self.out_in, self.dtype)

    def _dequantize_one(self, dtype: str) -> jax.Array:
        return scaled.dequantize(self.packed, dtype=dtype)

    def matmul(self, x: jax.Array) -> jax.Array:
        return scaled.matmul(x, self.packed)


@_register
@dataclasses.dataclass(frozen=True)
class Int8Array(EightBitArray):
    @property
    def format(self) -> Format:
        return Int8()


@_register
@dataclasses.dataclass(frozen=True)
class Float8Array(EightBitArray):
    granule = (128, 128)

    @property
    def format(self) -> Format:
        return Float8(None if self.scales.shape[-2] == self.out_in[0] else 128)
