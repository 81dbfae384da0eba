"""The default precision by its own name: NF4 with double quantisation."""

from typing import Any

import jax

from jaxtune.quant import packed
from jaxtune.quant.four_bit import FourBit, NF4Array
from jaxtune.quant.packed import bytes_per_weight, matmul

__all__ = ["FORMAT", "NF4Array", "abstract", "bytes_per_weight", "matmul", "quantize"]

FORMAT = FourBit()


def quantize(w: jax.Array) -> NF4Array:
    """w [..., out, in] in float32, float16 or bfloat16 -> NF4Array."""
    return packed.quantize(w, FORMAT)


def abstract(shape: tuple[int, ...], dtype: Any) -> NF4Array:
    """The shapes that `quantize` would give for a weight of this shape."""
    return packed.abstract(shape, dtype, FORMAT)
