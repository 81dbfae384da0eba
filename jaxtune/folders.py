"""Writing a folder so that nothing half-written is ever seen under its final name: a hidden folder beside the target is
filled, then the two change places. A folder that holds somebody else's files is left alone."""

import contextlib
import errno
import fnmatch
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jaxtune.errors import OutputFolderError

OURS = ("adapter_config.json", "metrics.jsonl", "tokenizer_config.json")
"""What else a folder of ours may be known by: an adapter, a run, a tokenizer that was saved before its model."""


def named(folder: str | Path) -> Path:
    """The folder that a caller asked to write to."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise OutputFolderError(
            f"The folder to write to is {folder!r}.",
            expected="a path.",
            fix='Pass one, such as "outputs/model".',
        )
    return Path(folder)


@contextlib.contextmanager
def staged(target: str | Path, marker: str, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder to write into; on success it takes the target's place, with those of the target's files that
    it does not replace: those of the same name, and those that the patterns in `replaces` match. `marker` is the file
    by which a folder of this kind is known as ours."""
    target = Path(target)
    refuse_strangers(target, marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise cannot_write(target, error) from error
    try:
        with _os_errors():
            yield stage
        os.chmod(stage, 0o777 & ~_umask())
        if target.exists():
            _keep_others(target, stage, replaces)
            _swap(stage, target)
        else:
            os.rename(stage, target)
    except OSError as error:
        raise cannot_write(target, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """safetensors and tokenizers tell of a full disk by exceptions of their own, with the system's number inside."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code)) from error


def _keep_others(target: Path, stage: Path, replaces: Sequence[str]) -> None:
    for entry in target.iterdir():
        if (stage / entry.name).exists() or any(fnmatch.fnmatch(entry.name, each) for each in replaces):
            continue
        if entry.is_dir():
            shutil.copytree(entry, stage / entry.name, copy_function=_link)
        else:
            _link(entry, stage / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    """A second name for the same bytes, as gigabytes of weights need no copy; a copy where names cannot be shared."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _swap(stage: Path, target: Path) -> None:
    """Between the two renames the target is absent; whatever happens, no mixture of old and new bears its name."""
    old = stage.with_suffix(".old")
    os.rename(target, old)
    try:
        os.rename(stage, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def refuse_strangers(target: Path, marker: str, others: Sequence[str] = OURS) -> None:
    """Raises unless `target` is free, empty, or has one of the files by which a folder is known as ours."""
    markers = tuple(dict.fromkeys((marker, *others)))
    if target.exists() and not target.is_dir():
        raise OutputFolderError(
            f"{target} is a file.", expected="a folder to write to.", fix="Choose another name."
        )
    if target.is_dir() and any(target.iterdir()) and not any((target / name).is_file() for name in markers):
        some = ", ".join(sorted(file.name for file in target.iterdir())[:3])
        raise OutputFolderError(
            f"{target} exists and holds files that are not ours ({some}).",
            expected=f"a new or empty folder, or one of ours, with {' or '.join(markers)}.",
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
