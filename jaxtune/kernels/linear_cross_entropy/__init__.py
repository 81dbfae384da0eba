"""Cross-entropy of a linear head without its logits."""

from jaxtune.kernels.linear_cross_entropy.api import linear_cross_entropy
from jaxtune.kernels.linear_cross_entropy.reference import IGNORE, Parts, product

__all__ = ["IGNORE", "Parts", "linear_cross_entropy", "product"]
