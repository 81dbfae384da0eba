"""Causal grouped-query attention over segments."""

from jaxtune.kernels.attention.api import attention, see

__all__ = ["attention", "see"]
