"""Rows out of files: JSON Lines, JSON, CSV and parquet, one row after the other where the format allows, so that a file
need not fit in memory. What cannot be read is an error that names the file and the line."""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxtune.errors import DatasetError, nearest

type PathLike = str | os.PathLike[str]

_MARK = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it


def read_dataset(path: PathLike | Sequence[PathLike]) -> "FileRows":
    """The rows of a file, or of several, one after the other: an iterable of dicts, read whenever it is iterated over.

    The name's ending says what a file is: `.jsonl` (or `.ndjson`) has a JSON object in every line; `.json` one list of
    objects, which is read whole; `.csv` and `.tsv` a header and then texts; `.parquet` a table.
    """
    paths = [path] if isinstance(path, str | os.PathLike) else list(path)
    files = tuple(Path(each).expanduser() for each in paths)
    for file in files:
        _reader_of(file)  # what is wrong with the last file is said before the first is read
    return FileRows(files)


def names_files(dataset: Any) -> bool:
    """Whether this is a path or a list of them. Strings in a list are paths if the first has a known ending: they may
    be texts, which are no rows and deserve an error of their own."""
    if isinstance(dataset, str | os.PathLike):
        return True
    if not isinstance(dataset, list | tuple) or not dataset:
        return False
    first = dataset[0]
    known = isinstance(first, str) and Path(first).suffix.lower() in _READERS
    return (known or isinstance(first, os.PathLike)) and all(
        isinstance(each, str | os.PathLike) for each in dataset
    )


@dataclass(frozen=True)
class FileRows:
    """What `read_dataset` returns. It has no length: that would mean to read everything."""

    files: tuple[Path, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file in self.files:
            rows = _reader_of(file)(file)
            first = next(rows, None)
            if first is None:
                raise DatasetError(
                    f"{file} has no rows.",
                    expected="at least one.",
                    fix="Check how it was written, or leave it out.",
                )
            yield first
            yield from rows


def _reader_of(file: Path) -> Callable[[Path], Iterator[dict[str, Any]]]:
    if os.path.isdir(file):  # unlike Path's method, it takes a text of any length for a path
        within = sorted(each.name for each in file.iterdir() if each.suffix.lower() in _READERS)
        raise DatasetError(
            f"{file} is a folder.",
            expected="a file, or a list of files.",
            fix=f"Pass those of its files that are meant: {within}." if within else "Pass a file with rows.",
        )
    if not os.path.exists(file):
        beside = [each.name for each in file.parent.iterdir()] if os.path.isdir(file.parent) else []
        raise DatasetError(
            f"there is no file {_quoted(os.fsencode(file), 1000)}.",
            expected="a file with rows, or a dataset.",
            fix="Check the path. A dataset of the hub is loaded first: `datasets.load_dataset(name, split=...)`."
            + nearest(file.name, beside),
        )
    if file.suffix.lower() not in _READERS:
        _refuse(
            f"{file} has the ending {file.suffix!r}.",
            f"one of {', '.join(_READERS)}.",
            "Rename it, or write it as JSON Lines: a JSON object in every line.",
            file,
        )
    return _READERS[file.suffix.lower()]


def _lines(file: Path) -> Iterator[tuple[str, bytes]]:
    """Every line, and how an error calls it."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if number == 1:
                line = line.removeprefix(_MARK)
            yield f"line {number} of {file}", line


def _json_lines(file: Path) -> Iterator[dict[str, Any]]:
    for where, line in _lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip().decode("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            _refuse(
                f"{where} is not JSON ({_why(error)}): {_quoted(line)}",
                "a JSON object in every line, in UTF-8.",
                "Correct or remove that line.",
                file,
            )
        yield _object(row, where, file)


def _json(file: Path) -> Iterator[dict[str, Any]]:
    text = file.read_bytes()
    if not text.strip():
        return
    try:
        rows = json.loads(text.decode("utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        number = (
            error.lineno if isinstance(error, json.JSONDecodeError) else text.count(b"\n", 0, error.start) + 1
        )
        _refuse(
            f"line {number} of {file} is not JSON ({_why(error)}): {_quoted(text.split(b'\n')[number - 1])}",
            "one list of JSON objects, in UTF-8.",
            "Correct the file.",
            file,
        )
    if not isinstance(rows, list):
        keys = f" with the keys {list(rows)}" if isinstance(rows, dict) else ""
        _refuse(
            f"{file} holds a JSON {_kind(rows)}{keys}.",
            "one list of JSON objects, the rows.",
            "Pass the list that is in it: `train_dataset=json.load(...)[key]`." if keys else "Write a list.",
            file,
        )
    for index, row in enumerate(rows):
        yield _object(row, f"item {index} of the list in {file}", file)


def _csv(file: Path) -> Iterator[dict[str, Any]]:
    lines = csv.reader(_decoded(file), delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
    header: list[str] = []
    while True:
        try:
            fields = next(lines, None)
        except csv.Error as error:
            _refuse(
                f"line {lines.line_num} of {file} is not CSV ({error}).",
                "fields with commas between them, quoted where they hold commas, quotes or line breaks.",
                "Correct that line, or write the file as JSON Lines, which has room for texts of any kind.",
                file,
            )
        if fields is None:
            return
        if not fields:  # an empty line
            continue
        if not header:
            header = _header(fields, file)
            continue
        if len(fields) != len(header):
            _refuse(
                f"line {lines.line_num} of {file} ends a row of {len(fields)} fields, and the header has "
                f"{len(header)}: {header}.",
                "as many fields in every row.",
                "Quote fields with commas or line breaks in them.",
                file,
            )
        yield dict(zip(header, fields, strict=True))


def _decoded(file: Path) -> Iterator[str]:
    for where, line in _lines(file):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            _refuse(
                f"{where} is {_why(error)}: {_quoted(line)}", "UTF-8.", "Convert the file to UTF-8.", file
            )


def _header(fields: list[str], file: Path) -> list[str]:
    if "" in fields or len(set(fields)) < len(fields):
        _refuse(
            f"the first line of {file} has the columns {fields}.",
            "a name for every column, each another.",
            "Correct the header; a column without a name is often an index that was written too.",
            file,
        )
    return fields


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise DatasetError(
            f"reading {file} needs pyarrow, which is not installed.",
            expected="pyarrow, which `datasets` brings along.",
            fix="Install it: `pip install pyarrow`.",
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        _refuse(
            f"{file} cannot be read as parquet ({error}).",
            "a whole parquet file.",
            "Write or fetch it again.",
            file,
        )


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}


def _object(row: Any, where: str, file: Path) -> dict[str, Any]:
    if not isinstance(row, dict):
        _refuse(
            f"{where} is a JSON {_kind(row)}, not an object.",
            'an object of columns, such as {"text": "..."}.',
            "Correct it, or remove it.",
            file,
        )
    return row


def _refuse(found: str, expected: str, fix: str, file: Path) -> NoReturn:
    raise DatasetError(found, expected=expected, fix=fix + _what_it_looks_like(file)) from None


def _what_it_looks_like(file: Path) -> str:
    """A sentence if the beginning of the file is that of another format than its name says."""
    with file.open("rb") as content:
        start = content.read(2**20)
    text = start.removeprefix(_MARK).lstrip()
    looks_like = None
    if start.startswith(b"PAR1"):
        looks_like = ".parquet"
    elif text.startswith(b"["):
        looks_like = ".json"
    elif text.startswith(b"{"):
        try:
            json.loads(text.splitlines()[0])
            looks_like = ".jsonl"
        except ValueError:
            looks_like = ".json"
    if looks_like is None or _READERS.get(file.suffix.lower()) is _READERS[looks_like]:
        return ""
    return f" By its content it is rather a {looks_like} file: rename it."


def _why(error: json.JSONDecodeError | UnicodeDecodeError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return f"not UTF-8 at byte {error.start}"


def _quoted(line: bytes, characters: int = 60) -> str:
    text = line.decode("utf-8", errors="replace").strip()
    return repr(text if len(text) <= characters else f"{text[:characters]}...")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
