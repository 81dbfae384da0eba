"""Quantising with a compiled program, on the GPU if there is one, else on the CPU: numpy's bytes, sooner."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.export.gguf.quants.jax_search import IMPORTANCES, JaxSearch

Quantiser = Callable[[Any, Any, Any], Any]
"""(numbers [rows, columns], importance, the arithmetic) -> bytes, block after block."""

_AT_ONCE = {"cpu": 1 << 18, "gpu": 1 << 23}
"""Numbers of one call: temporaries that stay in a cache, or enough for every processor of a GPU."""
_IN_FLIGHT = 3
"""Calls of a GPU: one that is sent, one that runs, one that is fetched."""


def is_fit(importance: np.ndarray | None) -> bool:
    """Whether no product with it may vanish."""
    if importance is None:
        return True
    least, most = IMPORTANCES
    return bool(((importance == 0) | ((importance >= least) & (importance <= most))).all())


def encode_rows(
    rows: np.ndarray,
    quantiser: Quantiser,
    row_bytes: int,
    importance: np.ndarray | None,
    in_numpy: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """[rows, columns] -> their bytes; a row is whole blocks. Rows with numbers that the device might round otherwise go
    by `in_numpy`, which gives their bytes too."""
    platform = jax.default_backend()
    count = max(1, _AT_ONCE[platform] // rows.shape[1])
    program = _program(quantiser, (count, rows.shape[1]), rows.dtype.name, importance is not None, platform)
    given = () if importance is None else (importance.astype(np.float32),)
    out = np.empty((len(rows), row_bytes), np.uint8)

    def convert(start: int) -> None:
        part, target = rows[start : start + count], out[start : start + count]
        whole = np.pad(part, [(0, count - len(part)), (0, 0)]) if len(part) < count else part
        encoded, are_odd = program(whole, np.int32(0), *given)
        target[:] = np.asarray(encoded)[: len(part)]
        odd = np.flatnonzero(np.asarray(are_odd)[: len(part)])
        if odd.size:
            target[odd] = in_numpy(part[odd])

    with ThreadPoolExecutor(_IN_FLIGHT if platform == "gpu" else os.cpu_count()) as threads:
        for _ in threads.map(convert, range(0, len(rows), count)):
            pass  # what was raised there is raised here
    return out


@functools.lru_cache
def _program(quantiser: Quantiser, shape: tuple[int, int], dtype: str, weighted: bool, platform: str) -> Any:
    def encode(
        x: jax.Array, nought: jax.Array, importance: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        x, search = x.astype(jnp.float32), JaxSearch(nought, on_gpu=platform == "gpu")
        return quantiser(x, importance, search).reshape(len(x), -1), search.are_odd(x, weighted)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):  # arrays are [N, B] and [B], as numpy's
        given = [jax.ShapeDtypeStruct(shape, dtype), np.int32(0)]
        given += [jax.ShapeDtypeStruct(shape[1:], np.float32)] * weighted
        return jax.jit(encode).lower(*given).compile()
