"""Cross-entropy of a linear head without its logits."""

from jaxtune.kernels.linear_cross_entropy.api import linear_cross_entropy, nll_and_entropy
from jaxtune.kernels.linear_cross_entropy.chunks import IGNORE
from jaxtune.kernels.linear_cross_entropy.reference import Parts, product

__all__ = ["IGNORE", "Parts", "linear_cross_entropy", "nll_and_entropy", "product"]
