"""Tokens on disk, so that the second run over a dataset begins at once.

What is kept is a chunk of rows, found again by content alone: the rows', the tokenizer's, that of the settings that
decide about tokens and labels, and that of the code that makes them. So a stream is served as well as a file, rows that
were added cost no more than themselves, and nothing has to be cleared after a change, of jaxtune itself included.
"""

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.data.readers import Chunk, Encoded, Reading
from jaxtune.data.sample import IGNORED
from jaxtune.log import get_logger
from jaxtune.version import __version__

log = get_logger(__name__)

LIMIT = 10 * 2**30
"""Bytes that the folder may hold. What was used longest ago goes first."""


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxtune" / "tokens"


class TokenCache:
    """One folder, for one reading of a dataset."""

    def __init__(self, folder: Path, reading: Reading):
        self._folder, self._reading = folder, reading
        self._settings = _settings(reading)
        self._can_write, self._wrote, self._rows, self._found = True, False, 0, 0

    def read(self, chunk: Chunk, reader: Callable[[Chunk, Reading], Iterator[Encoded]]) -> Iterator[Encoded]:
        """What the reader makes of the chunk, now or at an earlier time."""
        self._rows += len(chunk)
        file = self._file(chunk, reader.__name__)
        if file is None:
            yield from reader(chunk, self._reading)
            return
        first = chunk[0][0]
        encoded = _load(file, first)
        if encoded is None:
            encoded = list(reader(chunk, self._reading))
            self._store(file, encoded, first)
        else:
            self._found += len(chunk)
        yield from encoded

    def close(self) -> None:
        """Says what was found, and makes room."""
        if self._found:
            log.info("the tokens of %d of %d rows come from %s", self._found, self._rows, self._folder)
        if self._wrote:
            _prune(self._folder)

    def _file(self, chunk: Chunk, reader: str) -> Path | None:
        """Where the chunk's tokens belong; None if its content cannot be told."""
        if self._settings is None:
            return None
        content = hashlib.blake2b(self._settings + reader.encode(), digest_size=20)
        try:
            for _, row in chunk:
                content.update(
                    json.dumps(dict(row), ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
                )
        except (TypeError, ValueError):  # an image, an array
            return None
        return self._folder / f"{content.hexdigest()}.npz"

    def _store(self, file: Path, encoded: list[Encoded], first: int) -> None:
        if not self._can_write:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _save(file, encoded, first)
            self._wrote = True
        except OSError as error:
            self._can_write = False
            log.warning("tokens are not kept for the next run: %s", error)


def _settings(reading: Reading) -> bytes | None:
    """Everything besides the rows that tokens and labels depend on; None if it cannot be told."""
    tokenizer = reading.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        return None
    # A function has no content; a template that writes today's date makes other tokens tomorrow.
    if reading.formatting_func or "strftime_now" in str(tokenizer.chat_template):
        return None
    parts: list[Any] = [
        __version__,
        _code(),
        [version(name) for name in ("transformers", "tokenizers", "jinja2")],
        f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        tokenizer.split_special_tokens,
        reading.text_field,
        reading.completion_only_loss,
        reading.assistant_only_loss,
        reading.add_special_tokens,
        reading.vocab_size,
    ]
    return json.dumps(parts).encode()


@functools.cache
def _code() -> str:
    content = hashlib.blake2b(digest_size=20)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()


def _save(file: Path, encoded: list[Encoded], first: int) -> None:
    """Written under another name first: what has its own is whole."""
    ids = np.concatenate([each.ids for each in encoded]) if encoded else np.zeros(0, np.int32)
    labels = np.concatenate([each.labels for each in encoded]) if encoded else ids
    descriptor, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(
                stream,
                ids=ids,
                trained=np.packbits(labels != IGNORED),
                lengths=np.array([len(each.ids) for each in encoded], np.int64),
                rows=np.array([each.row - first for each in encoded], np.int64),
                border_moved=np.array([each.border_moved for each in encoded], bool),
                odd_role=np.array([each.odd_role for each in encoded], str),
            )
        os.replace(partial, file)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _load(file: Path, first: int) -> list[Encoded] | None:
    try:
        with file.open("rb") as stream, np.load(stream) as arrays:
            ids, lengths = arrays["ids"], arrays["lengths"]
            trained = np.unpackbits(arrays["trained"], count=len(ids)).astype(bool)
            facts = (arrays["rows"] + first, arrays["border_moved"], arrays["odd_role"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("%s cannot be read (%s): the rows are tokenised again", file, error)
        return None
    with contextlib.suppress(OSError):  # of someone else, who keeps the folder
        os.utime(file)
    labels = np.where(trained, ids, np.int32(IGNORED))
    borders = pairwise(accumulate(lengths.tolist(), initial=0))
    return [
        Encoded(ids[start:end], labels[start:end], *of_one)
        for (start, end), *of_one in zip(borders, *(each.tolist() for each in facts), strict=True)
    ]


def _prune(folder: Path) -> None:
    files = [(entry.stat(), entry.path) for entry in os.scandir(folder) if entry.name.endswith(".npz")]
    total = sum(stat.st_size for stat, _ in files)
    for stat, path in sorted(files, key=lambda each: each[0].st_mtime):
        if total <= LIMIT:
            return
        Path(path).unlink(missing_ok=True)
        total -= stat.st_size
