"""GGUF's tensor types: `encode` an array into the bytes of one."""

from jaxtune.export.gguf.quants.encoding import encode
from jaxtune.export.gguf.quants.types import TensorType, nbytes

__all__ = ["TensorType", "encode", "nbytes"]
