"""Frozen weights in fewer bits, as pytrees. `quant.matmul(x, w)` multiplies with any of them, or with a plain array."""

from jaxtune.quant.eight_bit import Float8, Float8Array, Int8, Int8Array
from jaxtune.quant.four_bit import FourBit, FourBitArray, FP4Array, NF4Array
from jaxtune.quant.packed import (
    Format,
    PackedArray,
    Unpacked,
    abstract,
    bytes_per_weight,
    dequantize,
    dequantized,
    is_packed,
    matmul,
    quantize,
)

__all__ = [
    "FP4Array",
    "Float8",
    "Float8Array",
    "Format",
    "FourBit",
    "FourBitArray",
    "Int8",
    "Int8Array",
    "NF4Array",
    "PackedArray",
    "Unpacked",
    "abstract",
    "bytes_per_weight",
    "dequantize",
    "dequantized",
    "is_packed",
    "matmul",
    "quantize",
]
