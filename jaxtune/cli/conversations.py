"""Forms of data that everybody has and the trainer does not read, made conversations: what a script calls `to_sharegpt`
and `standardize_sharegpt` for."""

from collections.abc import Mapping
from typing import Any

from jaxtune.data.merging import to_sharegpt
from jaxtune.data.sharegpt import standardize_sharegpt
from jaxtune.data.tables import is_table
from jaxtune.log import get_logger

log = get_logger(__name__)


def conversations(rows: Any, option: str, text_field: str) -> Any:
    """The rows of a table or of files as they are, unless the first of them is of Alpaca's form or of ShareGPT's.
    `option` is what named them."""
    first: Mapping[str, Any] = next(iter(rows), {})
    if {"input_ids", "completion", text_field} & first.keys():  # which says what is meant
        return rows
    if _is_sharegpt(first):
        log.info("%s is in ShareGPT's form: its messages become those of user and assistant.", option)
        return standardize_sharegpt(_whole(rows))
    if {"instruction", "output"} <= first.keys() and not {"messages", "conversations"} & first.keys():
        log.info(
            "%s is in Alpaca's form: the user says instruction (and input), the assistant output.", option
        )
        prompt = "{instruction}" + ("[[\n{input}]]" if "input" in first else "")
        return standardize_sharegpt(to_sharegpt(_whole(rows), prompt))
    return rows


def _whole(rows: Any) -> Any:
    return rows if is_table(rows) else list(rows)


def _is_sharegpt(row: Mapping[str, Any]) -> bool:
    messages = row.get("messages") or row.get("conversations")
    return isinstance(messages, list) and any(
        isinstance(message, Mapping) and (message.get("from") or message.get("role") in ("human", "gpt"))
        for message in messages
    )
