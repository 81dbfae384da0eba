"""Causal grouped-query attention over segments."""

from jaxtune.kernels.attention.api import attention

__all__ = ["attention"]
