"""GGUF's tensor types: `encode` an array into the bytes of one, `decode` these."""

from jaxtune.export.gguf.quants.decoding import decode
from jaxtune.export.gguf.quants.encoding import encode
from jaxtune.export.gguf.quants.types import TensorType, nbytes

__all__ = ["TensorType", "decode", "encode", "nbytes"]
