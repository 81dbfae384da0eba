"""NF4 and FP4: 4-bit codes with plain or double-quantised scales, bit-equal to bitsandbytes'."""

from jaxtune.kernels.nf4.api import Packed, dequantize, matmul, quantize

__all__ = ["Packed", "dequantize", "matmul", "quantize"]
