"""4-bit weights as bitsandbytes has them: NF4 and FP4, with plain or double-quantised scales."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax

from jaxtune.kernels import nf4
from jaxtune.kernels.nf4.layout import is_planar
from jaxtune.quant.packed import PackedArray

_register = functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "absmax", "nested_absmax", "offset"],
    meta_fields=["out_in", "dtype"],
)


@dataclasses.dataclass(frozen=True)
class FourBit:
    """The format: which 16 values, and whether the scales are quantised too."""

    values: str = "nf4"
    double: bool = True
    bits: ClassVar[int] = 4

    @property
    def name(self) -> str:
        return self.values.upper() + (" with double quantisation" if self.double else "")

    def quantize(self, w: jax.Array) -> "FourBitArray":
        packed = nf4.quantize(w, values=self.values, double=self.double)
        return ARRAYS[self.values](*packed, out_in=(w.shape[0], w.shape[1]), dtype=w.dtype.name)


@dataclasses.dataclass(frozen=True)
class FourBitArray(PackedArray):
    """Codes and scales; see `kernels/nf4/layout.py` for shapes. Plain scales are float32, without a second level."""

    codes: jax.Array
    absmax: jax.Array
    nested_absmax: jax.Array | None
    offset: jax.Array | None
    out_in: tuple[int, int]
    dtype: str

    values: ClassVar[str]
    granule = (1, 128)  # a tile of codes: 64 bytes, 2 scales

    @property
    def format(self) -> FourBit:
        return FourBit(self.values, self.offset is not None)

    @property
    def leading(self) -> tuple[int, ...]:
        return self.codes.shape[:-2] if self.is_cuttable else self.codes.shape[:-1]

    @property
    def is_cuttable(self) -> bool:
        """Not if its blocks cross rows."""
        return is_planar(self.out_in)

    @property
    def packed(self) -> nf4.Packed:
        return nf4.Packed(self.codes, self.absmax, self.nested_absmax, self.offset)

    def map_axes(self, place: Callable[..., Any]) -> Self:
        whole = ("out", "in") if self.is_cuttable else (None,)
        # The second level is 1/4096 of the codes, and its groups cross rows.
        nested, offset = (None, None) if self.offset is None else (place(None), place())
        return type(self)(place(*whole), place(*whole), nested, offset, self.out_in, self.dtype)

    def _dequantize_one(self, dtype: str) -> jax.Array:
        return nf4.dequantize(self.packed, shape=self.out_in, dtype=dtype, values=self.values)

    def matmul(self, x: jax.Array) -> jax.Array:
        return nf4.matmul(x, self.packed, self.out_in, values=self.values)


@_register
@dataclasses.dataclass(frozen=True)
class NF4Array(FourBitArray):
    values: ClassVar[str] = "nf4"


@_register
@dataclasses.dataclass(frozen=True)
class FP4Array(FourBitArray):
    values: ClassVar[str] = "fp4"


ARRAYS: dict[str, type[FourBitArray]] = {"nf4": NF4Array, "fp4": FP4Array}
"""bitsandbytes' name of the type -> the class."""
