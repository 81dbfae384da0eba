"""A compressed-tensors folder, read back: codes and scales mean what was merged, each weight as near as its format
allows."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxtune.errors import ExportError
from jaxtune.loading.checkpoint import Checkpoint, Tensors
from jaxtune.log import counted, get_logger

log = get_logger(__name__)

_ROWS = 32
"""Of a weight, from the first to the last."""


def verify_compressed(folder: Path, bits: int, linears: Sequence[str], merged: Tensors) -> None:
    """Raises if one of the `linears` is not near the merged one. Of 8 bits, a folder tells float8 from integers."""
    furthest = (0.0, "no weight")
    with Checkpoint(folder) as checkpoint:
        for name in linears:
            looked_at = np.unique(np.linspace(0, merged.shape(name)[0] - 1, _ROWS).astype(int))
            rows = merged.read(name)[looked_at].astype(np.float32)
            share = _share_of_bound(checkpoint, name, bits, looked_at, rows)
            if not share <= 1:
                raise ExportError(
                    f"{name}, read back, is off by {share:.3g} times what its {bits} bits allow.",
                    expected="the nearest code for each weight.",
                    fix="This is a fault of jaxtune's: please report it. verify=False writes the folder all the same.",
                )
            furthest = max(furthest, (share, name))
    log.info(
        "%s, read back: the nearest codes to the merged weights: off by at most %.2g of a half step (%s).",
        counted(len(linears), "linear"), *furthest,
    )  # fmt: skip


def _share_of_bound(
    checkpoint: Checkpoint, name: str, bits: int, looked_at: np.ndarray, expected: np.ndarray
) -> float:
    """How far values are from the merged ones, at most, in units of what may be: half a step, and at the ends of the
    codes what rounding the scale to its 16 bits adds."""
    module, columns = name.removesuffix("weight"), expected.shape[1]
    scales = checkpoint.read(f"{module}weight_scale")[looked_at].astype(np.float32)
    scales = scales.repeat(columns // scales.shape[1], axis=1)
    if name in checkpoint:
        codes = checkpoint.read(name)[looked_at].astype(np.float32)
        half_step = np.maximum(np.abs(expected) / 16, scales / 1024)
    else:
        codes = _unpacked(checkpoint.read(f"{module}weight_packed")[looked_at], bits, columns)
        half_step = scales / 2
    return float(np.max(np.abs(codes * scales - expected) / (half_step + np.abs(expected) / 256)))


def _unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int32 [rows, words] -> the codes, from the lowest bit up, counted from the least."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    unsigned = words.view(np.uint32)[..., None] >> shifts & np.uint32(2**bits - 1)
    return unsigned.reshape(len(words), -1)[:, :columns].astype(np.float32) - 2 ** (bits - 1)
