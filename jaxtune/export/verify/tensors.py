"""The weights of a Hugging Face folder, read back: names, shapes, dtypes, the file that each is in, and every byte."""

import concurrent.futures
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtune.errors import ExportError
from jaxtune.export.safetensors_stream import Entry
from jaxtune.export.verify.checksums import AGAIN, Checksums
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.log import counted, get_logger

log = get_logger(__name__)


def verify_tensors(folder: Path, shards: Mapping[str, Sequence[Entry]], checksums: Checksums) -> None:
    """Raises unless the folder has what `shards` say, with these checksums."""
    expected = {entry.name: entry for entries in shards.values() for entry in entries}
    with Checkpoint(folder) as checkpoint:
        found = {
            name: Entry(name, checkpoint.shape(name), checkpoint.dtype(name)) for name in checkpoint.names
        }
        for name in sorted({*expected, *found}):
            if expected.get(name) != found.get(name):
                raise ExportError(
                    f"The weights, read back: {name} is {_said(found.get(name))}.",
                    expected=f"{_said(expected.get(name))}, as written.",
                    fix=AGAIN,
                )
        with concurrent.futures.ThreadPoolExecutor() as threads:
            agree = lambda name: checksums.agree(name, checkpoint.read(name))
            for name, is_same in zip(expected, threads.map(agree, expected), strict=True):
                if not is_same:
                    raise ExportError(
                        f"The weights, read back: {name} has other bytes than were written.",
                        expected="the bytes that were written.",
                        fix=AGAIN,
                    )
    log.info("The weights, read back: %s as written.", counted(len(found), "tensor"))


def _said(entry: Entry | None) -> str:
    return "absent" if entry is None else f"{entry.dtype} {list(entry.shape)}"
