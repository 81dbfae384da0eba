"""What is taken out of one dataset row, checked: a field of the wrong form is a `DatasetError` that names the row."""

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np

from jaxtune.data.files import names_files, read_dataset
from jaxtune.errors import DatasetError

type Row = Mapping[str, Any]

_OF_THE_SPEAKER = ("role", "from", "name", "weight")  # what a message has besides what it says


def iterate_rows(dataset: Any) -> Iterator[Row]:
    """The rows of a list of dicts, a `datasets.Dataset` or `IterableDataset`, a pandas `DataFrame`, a generator,
    anything with `__len__` and `__getitem__`, or of files (`read_dataset`). They are read one after the other, as they
    are asked for."""
    if names_files(dataset):
        dataset = read_dataset(dataset)
    elif hasattr(dataset, "itertuples"):
        dataset = _rows_of_frame(dataset)
    if isinstance(dataset, bytes | Mapping):
        kind = f"a mapping with the keys {list(dataset)}" if isinstance(dataset, Mapping) else "bytes"
        raise DatasetError(
            f"the dataset is {kind}.",
            expected="one split: a `datasets.Dataset`, a list (or any iterable) of dicts, or the path of a file.",
            fix='Pass a split, such as `dataset["train"]`.',
        )
    if callable(dataset) and not hasattr(dataset, "__getitem__"):
        raise DatasetError(
            f"the dataset is the function {getattr(dataset, '__name__', dataset)!r}.",
            expected="what it returns.",
            fix="Call it.",
        )
    rows = iter(dataset) if hasattr(dataset, "__iter__") else map(dataset.__getitem__, range(len(dataset)))
    first = next(rows, None)
    if first is None:
        raise DatasetError(
            "the dataset has no rows.",
            expected="at least one row.",
            fix="Check the split, the filters and the path that it was loaded from.",
        )
    return _only_dicts(chain([first], rows))


def text_field(row: Row, index: int, field: str) -> str:
    value = field_of(row, index, field)
    if not isinstance(value, str):
        fix = "Correct or remove that row."
        if _is_list_of_dicts(value):
            fix = "A conversation belongs in a column `messages` (or in both `prompt` and `completion`)."
        raise bad_row(index, f"has {_kind(value)} in {field!r}", "a string", fix)
    return value


def messages_field(row: Row, index: int, field: str) -> list[Row]:
    value = field_of(row, index, field)
    if not isinstance(value, list | tuple) or not all(isinstance(message, Mapping) for message in value):
        raise bad_row(
            index,
            f"has {_kind(value)} in {field!r}",
            'a list of messages, each a dict such as {"role": "user", "content": "..."}',
            "Correct that row; prompt and completion must both be text, or both conversations.",
        )
    for number, message in enumerate(value):
        _require_content(message, f"message {number} of {field!r}", index)
    return list(value)


def _require_content(message: Row, which: str, index: int) -> None:
    """Content may be absent where something else is there, such as `tool_calls`: that is for the template to judge. A
    message with nothing at all some templates write as an empty turn."""
    if all(value is None for key, value in message.items() if key not in _OF_THE_SPEAKER):
        content = "value" if "from" in message else "content"
        lack = f"nothing (None) in {content!r}" if content in message else f"no {content!r}"
        raise bad_row(
            index,
            f"has {lack} in {which}, whose keys are {list(message)}",
            "a text, which may be empty",
            "Correct or remove that row.",
        )


def formatted_texts(row: Row, index: int, formatting_func: Callable[[Row], str | list[str]]) -> list[str]:
    texts = formatting_func(row)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise bad_row(
            index,
            f"made formatting_func return {_kind(texts)}",
            "a string, or a list of strings (one for each sample)",
            "Return the finished text, e.g. `tokenizer.apply_chat_template(messages, tokenize=False)`.",
        )
    return list(texts)


def integers_field(row: Row, index: int, field: str, length: int | None = None) -> np.ndarray:
    """A flat list of integers as int32; with `length`, one value for each token."""
    value = np.asarray(field_of(row, index, field))
    if value.size == 0:
        value = value.astype(np.int32)
    if value.ndim != 1 or value.dtype.kind not in "iub":
        raise bad_row(
            index,
            f"has values of type {value.dtype} and shape {value.shape} in {field!r}",
            "a flat list of integers",
            "Tokenise with one list of ids for each row, without batching or nesting.",
        )
    if length is not None and len(value) != length:
        raise bad_row(
            index,
            f"has {len(value)} values in {field!r} and {length} in 'input_ids'",
            "one value for each token",
            "Truncate and pad both columns alike, or leave that to jaxtune.",
        )
    return value.astype(np.int32)


def template_options(row: Row, index: int) -> dict[str, Any]:
    """TRL's two optional columns that reach the chat template: `tools` (also as JSON text), `chat_template_kwargs`."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise bad_row(
                index, f"has text in 'tools' that is not JSON ({error})", "a list of tools", "Correct it."
            ) from error
    return {"tools": tools or None, **(row.get("chat_template_kwargs") or {})}


def bad_row(index: int, found: str, expected: str, fix: str) -> DatasetError:
    return DatasetError(f"row {index} of the dataset {found}.", expected=f"{expected}.", fix=fix)


def _rows_of_frame(frame: Any) -> Iterator[Row]:
    """Of a pandas DataFrame, whose NaN says that a cell holds nothing."""
    columns = [str(name) for name in frame.columns]
    for cells in frame.itertuples(index=False, name=None):
        yield {
            name: None if isinstance(cell, float) and cell != cell else cell
            for name, cell in zip(columns, cells, strict=True)
        }


def _only_dicts(rows: Iterator[Any]) -> Iterator[Row]:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise bad_row(
                index, f"is {_kind(row)}", "a dict of columns", 'Wrap plain texts as {"text": ...}.'
            )
        yield row


def field_of(row: Row, index: int, field: str) -> Any:
    if field not in row:
        raise bad_row(
            index,
            f"has no {field!r}; it has {sorted(row)}",
            "every row to have the columns of the first",
            "Correct that row, or split the dataset by form.",
        )
    return row[field]


def _is_list_of_dicts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _kind(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
