"""Writing a folder so that nothing half-written is ever seen under its final name: files are made in a hidden folder
beside the target, then moved into place one by one. A folder that holds somebody else's files is left alone."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from jaxtune.errors import OutputFolderError


@contextlib.contextmanager
def staged(target: str | Path, marker: str) -> Iterator[Path]:
    """A temporary folder to write into; on success its files replace those of the same name in `target`.

    `marker` is the file by which a folder is known as ours: an existing, non-empty folder without it is refused."""
    target = Path(target)
    refuse_strangers(target, marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        yield stage
        if not target.exists():
            os.chmod(stage, 0o777 & ~_umask())
            os.rename(stage, target)
        else:
            # The marker goes last: an interrupted replacement of an old folder still reads as the old one.
            for file in sorted(stage.iterdir(), key=lambda file: file.name == marker):
                os.replace(file, target / file.name)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def refuse_strangers(target: Path, marker: str) -> None:
    """Raises unless `target` is free, empty, or has the file by which a folder is known as ours."""
    if target.exists() and not target.is_dir():
        raise OutputFolderError(
            f"{target} is a file.", expected="a folder to write to.", fix="Choose another name."
        )
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        some = ", ".join(sorted(file.name for file in target.iterdir())[:3])
        raise OutputFolderError(
            f"{target} exists and holds files that are not ours ({some}).",
            expected=f"a new or empty folder, or one with a {marker} to be replaced.",
            fix="Choose another folder, or empty this one.",
        )


def cannot_write(target: Path, error: OSError) -> OutputFolderError:
    full = error.errno == errno.ENOSPC
    return OutputFolderError(
        f"Writing {target} failed: {error.strerror or error}.",
        expected="a place that can be written, with enough space.",
        fix="Free some space and save again." if full else "Check the path and its permissions.",
    )


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
