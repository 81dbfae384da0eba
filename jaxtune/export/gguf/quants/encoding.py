"""From arrays to the bytes of GGUF's tensor types. Blocks lie along the last axis and never cross a row.

The bytes are those of llama.cpp's `ggml_quantize_chunk`, for every block: its arithmetic is repeated step by step, in
float32 and in its order of additions.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxtune.errors import OptionError
from jaxtune.export.gguf.quants import floats, iq1, iq2_iq3, iq4, k_quants, legacy, on_device, search
from jaxtune.export.gguf.quants.pack import DoesNotFit
from jaxtune.export.gguf.quants.types import TensorType, nbytes

_CHUNK = 1 << 18
"""Numbers that are converted at once, whole rows: enough to make numpy's calls worth their while, few enough for the
temporaries to stay in a cache."""
_THREADS = 8
"""numpy lets others run while it computes."""
WORTH_COMPILING = 1 << 22
"""Numbers of a tensor for which numpy takes longer than a program takes to compile, which then serves the others."""


def encode(
    array: np.ndarray, type: TensorType, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Any float array -> its bytes as uint8. A value that the type cannot hold raises, with the tensor's `name`.

    `importance` says how much the errors of a column count: [columns], or [experts, columns] for stacked experts."""
    if type.needs_importance and importance is None:
        raise OptionError(
            f"{name} is to become {type.name}, and has no importance.",
            expected=f"an importance matrix that has {name}.",
            fix="Give what save_imatrix or llama-imatrix measured with this model, or take a larger type.",
        )
    if importance is not None and importance.ndim == 2:
        experts = zip(array, importance, strict=True)
        return np.concatenate([encode(expert, type, name, columns) for expert, columns in experts])
    rows = array.reshape(-1, array.shape[-1])
    in_numpy = functools.partial(_in_numpy, type=type, name=name, importance=importance)
    if _goes_to_the_device(rows, type, importance):
        # Without an importance no block knows its row: one program serves all sizes.
        rows = rows.reshape(-1, type.block) if importance is None else rows
        row_bytes = nbytes(rows.shape[1:], type)
        return on_device.encode_rows(rows, ON_DEVICE[type], row_bytes, importance, in_numpy).reshape(-1)
    step = max(1, _CHUNK // rows.shape[1])
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        parts = threads.map(lambda start: in_numpy(rows[start : start + step]), range(0, len(rows), step))
        return np.concatenate([*parts]).reshape(-1)


def _goes_to_the_device(rows: np.ndarray, type: TensorType, importance: np.ndarray | None) -> bool:
    if type not in ON_DEVICE or rows.size < WORTH_COMPILING or not on_device.is_fit(importance):
        return False
    return jax.default_backend() == "gpu" or importance is not None or type not in SOONER_IN_NUMPY


def _in_numpy(rows: np.ndarray, type: TensorType, name: str, importance: np.ndarray | None) -> np.ndarray:
    """[rows, bytes]"""
    x = rows.astype(np.float32)
    try:
        with np.errstate(all="ignore"):  # what comes of it is dealt with where it matters
            if not np.isfinite(x).all():
                raise DoesNotFit
            encoded = _IN_NUMPY[type](x, importance)
    except DoesNotFit:
        raise OptionError(
            f"{name} holds values that {type.name} cannot: its largest is {np.abs(x).max():g}.",
            expected="values, and where there are scales, scales within float16's 65504.",
            fix='Use quantization_method="bf16" or "f32".',
        ) from None
    return encoded.reshape(len(x), -1)


ON_DEVICE = {
    TensorType.Q4_0: legacy.q4_0,
    TensorType.Q4_1: legacy.q4_1,
    TensorType.Q5_0: legacy.q5_0,
    TensorType.Q5_1: legacy.q5_1,
    TensorType.Q8_0: legacy.q8_0,
    TensorType.Q2_K: k_quants.q2_k,
    TensorType.Q3_K: k_quants.q3_k,
    TensorType.Q4_K: k_quants.q4_k,
    TensorType.Q5_K: k_quants.q5_k,
    TensorType.Q6_K: k_quants.q6_k,
}
"""Those whose arithmetic may be numpy's or JAX's."""
SOONER_IN_NUMPY = {TensorType.Q3_K}
"""On a CPU, without an importance: numpy leaves out the sub-blocks that are done."""

_IN_NUMPY: dict[TensorType, Callable[..., np.ndarray]] = {
    **{type: functools.partial(quantiser, on=search) for type, quantiser in ON_DEVICE.items()},
    TensorType.F32: floats.f32,
    TensorType.F16: floats.f16,
    TensorType.BF16: floats.bf16,
    TensorType.IQ1_S: iq1.iq1_s,
    TensorType.IQ1_M: iq1.iq1_m,
    TensorType.IQ2_XXS: iq2_iq3.iq2_xxs,
    TensorType.IQ2_XS: iq2_iq3.iq2_xs,
    TensorType.IQ2_S: iq2_iq3.iq2_s,
    TensorType.IQ3_XXS: iq2_iq3.iq3_xxs,
    TensorType.IQ3_S: iq2_iq3.iq3_s,
    TensorType.IQ4_NL: iq4.iq4_nl,
    TensorType.IQ4_XS: iq4.iq4_xs,
}
