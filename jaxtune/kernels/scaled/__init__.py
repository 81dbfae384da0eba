"""8-bit weights (int8, float8) with one float32 scale for every row or block of the matrix."""

from jaxtune.kernels.scaled.api import Scaled, dequantize, matmul, quantize

__all__ = ["Scaled", "dequantize", "matmul", "quantize"]
