"""How far the values of a GGUF type may be from what was written, for any weights.

The error of a block grows with its largest value, which decides the steps between what can be written, and no less
with its usual values, of which most of it is made. So it is measured in units of the geometric mean of the two: the
root mean square of what is lost, over sqrt(largest * root mean square of what there was). That hardly depends on how
the values are distributed: other rows are about 1 away, a scale twice as large a half.
"""

from typing import NamedTuple

import numpy as np

from jaxtune.export.gguf.quants import TensorType


class Bound(NamedTuple):
    error: float
    """Of a block, in these units. Beyond the worst that was found (docs/export.md) by a sixth to a third."""
    reach: float
    """The largest multiple of the float16 scale that a value can be: where scales are so small that float16 rounds them
    coarsely, values are off by that many times half its smallest step."""


BOUNDS = {
    TensorType.F32: Bound(0, 0),
    TensorType.F16: Bound(2**-11, 1),
    TensorType.BF16: Bound(2**-8, 2**-109),  # whose own smallest step is as much smaller
    TensorType.Q8_0: Bound(0.012, 127),
    TensorType.Q6_K: Bound(0.04, 128 * 32),
    TensorType.Q5_1: Bound(0.08, 31 + 1),
    TensorType.Q5_K: Bound(0.14, 63 * 31 + 63),
    TensorType.Q5_0: Bound(0.092, 16),
    TensorType.Q4_1: Bound(0.155, 15 + 1),
    TensorType.Q4_K: Bound(0.075, 63 * 15 + 63),
    TensorType.Q4_0: Bound(0.175, 8),
    TensorType.IQ4_NL: Bound(0.12, 127),
    TensorType.IQ4_XS: Bound(0.125, 32 * 127),
    TensorType.Q3_K: Bound(0.265, 32 * 4),
    TensorType.IQ3_S: Bound(0.23, 31 * 15),
    TensorType.IQ3_XXS: Bound(0.255, 15.5 / 2 * 62),
    TensorType.Q2_K: Bound(0.435, 15 * 3 + 15),
    TensorType.IQ2_S: Bound(0.58, 15.5 / 4 * 43),
    TensorType.IQ2_XS: Bound(0.58, 15.5 / 4 * 43),
    TensorType.IQ2_XXS: Bound(0.6, 15.5 / 4 * 43),
    TensorType.IQ1_M: Bound(0.58, 15 * 1.125),
    TensorType.IQ1_S: Bound(0.65, 15 * 1.125),
}
_HALF_STEP = 2.0**-25
"""Half of float16's smallest."""


def errors(
    found: np.ndarray, expected: np.ndarray, type: TensorType, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Of each block [rows, blocks of a row]: its error, in the values' own units, and the most that it may be.

    Errors count as the importance of their columns, [columns] or [rows, columns], had them count when it was written.
    """
    by_block = lambda a: np.asarray(a, np.float64).reshape(len(expected), -1, type.block)
    x, off = by_block(expected), by_block(found) - by_block(expected)
    weight = by_block(np.broadcast_to(1.0 if importance is None else importance, expected.shape))
    together = np.maximum(weight.sum(axis=2), np.finfo(np.float64).tiny)
    error = np.sqrt((weight * off * off).sum(axis=2) / together)
    size = np.sqrt(np.sqrt((x * x).mean(axis=2)) * np.abs(x).max(axis=2))
    bound = BOUNDS[type]
    return error, bound.error * size + bound.reach * _HALF_STEP
