"""The types that are plain floats. No column is more important than another here."""

import ml_dtypes
import numpy as np

from jaxtune.export.gguf.quants.pack import DoesNotFit, half


def f32(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return x.view(np.uint8)


def f16(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return half(x).view(np.uint8)


def bf16(x: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    rounded = x.astype(ml_dtypes.bfloat16)
    if not np.isfinite(rounded.astype(np.float32)).all():  # numpy knows float32 better than bfloat16
        raise DoesNotFit
    return rounded.view(np.uint8)
