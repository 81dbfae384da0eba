"""A GGUF file is what it was made of. As each tensor is written, rows of its blocks are decoded and compared with the
weights; then the file is read back, its keys, its list of tensors and every byte."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import ExportError
from jaxtune.export.gguf.quants import decode
from jaxtune.export.gguf.reader import read_gguf
from jaxtune.export.gguf.writer import TensorInfo
from jaxtune.export.verify.bounds import errors
from jaxtune.export.verify.checksums import AGAIN, Checksums
from jaxtune.log import counted, get_logger

log = get_logger(__name__)

_ROWS = 32
"""Of a tensor, from the first to the last. One of few numbers is compared whole."""
_FEW = 1 << 16


class Written:
    """What went into the files of a model."""

    def __init__(self) -> None:
        self.checksums = Checksums()
        self.furthest = Off("no tensor", 0, 0.0, 0.0)

    def note(
        self, info: TensorInfo, array: np.ndarray, importance: np.ndarray | None, blocks: np.ndarray
    ) -> None:
        """`array` became `blocks`, its columns as important as that. Raises if they do not mean what it does."""
        off = furthest_off(info, array, importance, blocks)
        if not off.share <= 1:
            raise ExportError(
                f"{info.name}, of type {info.type.name}, is off by {off.error:.3g} in row {off.row} (root mean square "
                "of a block).",
                expected=f"at most {off.bound:.3g}, of this type and for these weights.",
                fix="Take a method of more bits; if it is of 16 or 32, this is a fault of jaxtune's. verify=False "
                "writes the file all the same.",
            )
        self.furthest = max(self.furthest, off, key=lambda each: each.share)
        self.checksums.note(info.name, blocks)


class Off(NamedTuple):
    """By how much a block is off."""

    name: str
    row: int
    error: float
    bound: float

    @property
    def share(self) -> float:
        """Of the bound; NaN is beyond any."""
        return self.error / self.bound if self.bound else 0.0 if self.error == 0 else np.inf


def furthest_off(
    info: TensorInfo, array: np.ndarray, importance: np.ndarray | None, blocks: np.ndarray
) -> Off:
    rows, stored = array.reshape(-1, array.shape[-1]), blocks.reshape(array.size // array.shape[-1], -1)
    looked_at = np.unique(
        np.linspace(0, len(rows) - 1, len(rows) if array.size <= _FEW else _ROWS).astype(int)
    )
    if importance is not None and importance.ndim == 2:  # of experts, whose rows follow one another
        importance = importance[looked_at * len(importance) // len(rows)]
    error, bound = errors(decode(stored[looked_at], info.type), rows[looked_at], info.type, importance)
    beyond = np.where(np.isfinite(error), error / np.maximum(bound, np.finfo(np.float64).tiny), np.inf)
    at = np.unravel_index(np.argmax(beyond), beyond.shape)
    return Off(info.name, int(looked_at[at[0]]), float(error[at]), float(bound[at]))


def verify_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo], written: Written
) -> None:
    """Raises if the file is not what was written."""
    file = read_gguf(path)
    _require_same(path.name, "keys", _plain(metadata), _plain(file.metadata))
    _require_same(
        path.name,
        "tensors",
        {info.name: info for info in tensors},
        {name: tensor.info for name, tensor in file.tensors.items()},
    )
    for name, tensor in file.tensors.items():
        if not written.checksums.agree(name, tensor.data):
            raise ExportError(
                f"{path.name}, read back: {name} has other bytes than were written.",
                expected="the bytes that were written.",
                fix=AGAIN,
            )
    off = written.furthest
    lost = f"off by at most {off.share:.0%} of what their types allow ({off.name})" if off.error else "exact"
    log.info(
        "%s: read back, %s as written; values %s.", path.name, counted(len(file.tensors), "tensor"), lost
    )


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What can be compared with ==: the values' types are part of it."""
    return {
        key: (value.dtype.str, value.tolist()) if isinstance(value, np.ndarray | np.generic) else value
        for key, value in metadata.items()
    }


def _require_same(file: str, what: str, expected: dict[str, Any], found: dict[str, Any]) -> None:
    differ = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differ or list(expected) != list(found):
        name = differ[0] if differ else "their order"
        raise ExportError(
            f"{file}, read back: of its {what}, {name} is {found.get(name, list(found))!r:.200}.",
            expected=f"{expected.get(name, list(expected))!r:.200}, as written.",
            fix=AGAIN,
        )
