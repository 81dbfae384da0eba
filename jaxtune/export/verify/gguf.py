"""A GGUF file, read back: its keys and its list of tensors, every byte, and what rows of every tensor mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import ExportError
from jaxtune.export.gguf.quants import decode
from jaxtune.export.gguf.reader import Tensor, read_gguf
from jaxtune.export.gguf.writer import TensorInfo
from jaxtune.export.verify.bounds import errors
from jaxtune.export.verify.written import AGAIN, Checksums, Sample, sample
from jaxtune.log import counted, get_logger

log = get_logger(__name__)


class Written:
    """What went into the files of a model."""

    def __init__(self) -> None:
        self.checksums = Checksums()
        self.samples: dict[str, tuple[Sample, np.ndarray | None]] = {}

    def note(
        self, info: TensorInfo, array: np.ndarray, importance: np.ndarray | None, blocks: np.ndarray
    ) -> None:
        """`array` became `blocks`, each column as important as that."""
        rows = sample(array)
        if importance is not None and importance.ndim == 2:  # of experts, whose rows follow one another
            importance = importance[rows.places * len(importance) // (array.size // array.shape[-1])]
        self.samples[info.name] = rows, importance
        self.checksums.note(info.name, blocks)


def verify_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo], written: Written
) -> None:
    """Raises if the file is not what was to be written."""
    file = read_gguf(path)
    _require_same(path.name, "keys", _plain(metadata), _plain(file.metadata))
    _require_same(
        path.name,
        "tensors",
        {info.name: info for info in tensors},
        {name: tensor.info for name, tensor in file.tensors.items()},
    )
    furthest = _Off("no tensor", 0, 0.0, 0.0, 0.0)
    for name, tensor in file.tensors.items():
        if not written.checksums.agree(name, tensor.data):
            raise ExportError(
                f"{path.name}, read back: {name} has other bytes than were written.",
                expected="the bytes that were written.",
                fix=AGAIN,
            )
        off = _furthest_off(tensor, *written.samples[name])
        if off.share > 1:
            raise ExportError(
                f"{path.name}, read back: {name}, of type {tensor.info.type.name}, is off by {off.error:.3g} in row "
                f"{off.row} (root mean square of a block).",
                expected=f"at most {off.bound:.3g}, of this type and for these weights.",
                fix="Take a method of more bits; if it is of 16 or 32, this is a fault of jaxtune's. verify=False "
                "writes the file all the same.",
            )
        furthest = max(furthest, off, key=lambda each: each.share)
    log.info(
        "%s: read back, %s as written; values off by at most %.0f%% of what their types allow (%s).",
        path.name,
        counted(len(file.tensors), "tensor"),
        100 * furthest.share,
        furthest.name,
    )


class _Off(NamedTuple):
    """By how much a block is off."""

    name: str
    row: int
    error: float
    bound: float
    share: float
    """Of the bound."""


def _furthest_off(tensor: Tensor, rows: Sample, importance: np.ndarray | None) -> _Off:
    info = tensor.info
    error, bound = errors(decode(tensor.rows[rows.places], info.type), rows.rows, info.type, importance)
    share = np.divide(error, bound, out=np.where(error > 0, np.inf, 0), where=bound > 0)
    share = np.where(np.isfinite(error), share, np.inf)
    at = np.unravel_index(np.argmax(share), share.shape)
    return _Off(info.name, int(rows.places[at[0]]), float(error[at]), float(bound[at]), float(share[at]))


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
            f"{file}, read back: of its {what}, {name} is {found.get(name)!r:.200}.",
            expected=f"{expected.get(name)!r:.200}, as written.",
            fix=AGAIN,
        )
