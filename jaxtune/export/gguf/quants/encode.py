"""From arrays to the bytes of GGUF's tensor types. Blocks lie along the last axis and never cross a row.

The bytes are those of llama.cpp's `ggml_quantize_chunk`, for every block: its arithmetic is repeated step by step, in
float32 and in its order of additions.
"""

import numpy as np

from jaxtune.errors import OptionError
from jaxtune.export.gguf.quants import floats, iq4, k_quants, legacy
from jaxtune.export.gguf.quants.pack import DoesNotFit
from jaxtune.export.gguf.quants.types import TensorType, nbytes

_CHUNK = 1 << 18
"""Numbers that are converted at once, whole rows: enough to make numpy's calls worth their while, few enough for the
temporaries to stay in a cache."""


def encode(
    array: np.ndarray, type: TensorType, name: str, importance: np.ndarray | None = None
) -> np.ndarray:
    """Any float array -> its bytes as uint8. A value that the type cannot hold raises, with the tensor's `name`.

    `importance`, one positive number for each column, says how much errors there count: an importance matrix's row."""
    rows = array.reshape(-1, array.shape[-1])
    out = np.empty((len(rows), nbytes(rows.shape[1:], type)), np.uint8)
    step = max(1, _CHUNK // rows.shape[1])
    for start in range(0, len(rows), step):
        chunk = rows[start : start + step].astype(np.float32)
        try:
            with np.errstate(all="ignore"):  # what comes of it is dealt with where it matters
                if not np.isfinite(chunk).all():
                    raise DoesNotFit
                done = _QUANTISERS[type](chunk, importance)
        except DoesNotFit:
            raise OptionError(
                f"{name} holds values that {type.name} cannot: its largest is {np.abs(chunk).max():g}.",
                expected="values, and where there are scales, scales within float16's 65504.",
                fix='Use quantization_method="bf16" or "f32".',
            ) from None
        out[start : start + step] = done.reshape(len(chunk), -1)
    return out.reshape(-1)


_QUANTISERS = {
    TensorType.F32: floats.f32,
    TensorType.F16: floats.f16,
    TensorType.BF16: floats.bf16,
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
    TensorType.IQ4_NL: iq4.iq4_nl,
    TensorType.IQ4_XS: iq4.iq4_xs,
}
