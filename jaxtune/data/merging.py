"""`to_sharegpt`: conversations out of the columns of a table, by a text with the columns' names in braces."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.data.batches import epoch_order
from jaxtune.data.rows import Row, bad_row, field_of
from jaxtune.data.tables import column_among, column_names, is_table, map_rows
from jaxtune.errors import DatasetError, OptionError, nearest

_SECTION = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def to_sharegpt(
    dataset: Any,
    merged_prompt: str = "",
    merged_column_name: str = "instruction",
    output_column_name: str = "output",
    remove_unused_columns: bool = True,
    conversation_extension: int = 1,
    random_state: int = 3407,
) -> Any:
    """The dataset with a column `conversations`: of each row, a question made of its columns, and its answer.

    Args:
        dataset: a `datasets.Dataset` or a list of dicts.
        merged_prompt: the question: a text with `{column}` where a column's value belongs. A section in `[[` and `]]`
            is left out of rows in which one of its columns is empty. `{{` and `}}` are braces. Without a
            merged_prompt, the question is the column `merged_column_name`.
        merged_column_name: that column; or, of a merged_prompt, the column that keeps the text where columns are kept.
        output_column_name: the column of the answer.
        remove_unused_columns: leaves `conversations` alone in the rows.
        conversation_extension: how many rows are joined in one conversation, for models that are to answer more than
            once. There are as many conversations as rows; each begins with its row, has no row twice, and every row is
            in as many as are joined.
        random_state: which rows are joined.
    """
    column_among(dataset, [output_column_name], "Name the column of the answers in output_column_name.")
    if not merged_prompt:
        fix = "Name the column of the questions in merged_column_name, or pass a merged_prompt."
        column_among(dataset, [merged_column_name], fix)
    prompt = _parse(merged_prompt) if merged_prompt else [_Section(("", _Column(merged_column_name)))]
    _require_columns(prompt, column_names(dataset))

    def change(row: Row, index: int) -> dict[str, Any]:
        question = "".join(section.of(row, index) for section in prompt)
        answer = _text(field_of(row, index, output_column_name), index, output_column_name)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        kept = {} if remove_unused_columns or not merged_prompt else {merged_column_name: question}
        return {**kept, "conversations": turns}

    single = map_rows(
        dataset, change, drop_others=remove_unused_columns, description="Making conversations of columns"
    )
    return single if conversation_extension == 1 else _joined(single, conversation_extension, random_state)


def _joined(dataset: Any, count: int, seed: int) -> Any:
    """Every conversation followed by those that come after it in a random circle of all."""
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    if rows is None or not isinstance(count, int) or not 1 <= count <= rows:
        size = "is a stream" if rows is None else f"has {rows} rows"
        raise OptionError(
            f"conversation_extension is {count!r}, and the dataset {size}.",
            expected="a number from 1 to that of the rows, which have to be known.",
            fix="Load the dataset whole, or leave the option out: 1 joins none.",
        )
    circle = epoch_order(rows, seed, 0).tolist()
    place = {row: at for at, row in enumerate(circle)}
    chats = list(dataset["conversations"]) if is_table(dataset) else [row["conversations"] for row in dataset]
    joined = [
        [turn for step in range(count) for turn in chats[circle[(place[row] + step) % rows]]]
        for row in range(rows)
    ]
    if is_table(dataset):
        if dataset.column_names == ["conversations"]:
            return type(dataset).from_dict({"conversations": joined})
        return dataset.remove_columns("conversations").add_column("conversations", joined)
    return [{**row, "conversations": chat} for row, chat in zip(dataset, joined, strict=True)]


@dataclass(frozen=True)
class _Column:
    name: str


@dataclass(frozen=True)
class _Section:
    """A stretch of the prompt: texts and columns in their order."""

    parts: Sequence[str | _Column]
    optional: bool = False

    def of(self, row: Row, index: int) -> str:
        values = {column: field_of(row, index, column) for column in self.columns}
        if self.optional and any(_is_empty(value) for value in values.values()):
            return ""
        return "".join(
            part if isinstance(part, str) else _text(values[part.name], index, part.name)
            for part in self.parts
        )

    @property
    def columns(self) -> list[str]:
        return [part.name for part in self.parts if isinstance(part, _Column)]


def _parse(prompt: str) -> list[_Section]:
    sections = []
    for number, piece in enumerate(_SECTION.split(prompt)):  # outside, inside, outside, ...
        section = _Section(tuple(_parts(piece, prompt)), optional=number % 2 == 1)
        if not section.optional and (alone := next((mark for mark in ("[[", "]]") if mark in piece), None)):
            raise OptionError(
                f"merged_prompt has a single {alone!r}: {prompt!r}.",
                expected="[[ and ]] around every optional section, none inside another.",
                fix="Close the section, or take the brackets away.",
            )
        if section.optional and not section.columns:
            raise OptionError(
                f"the optional section [[{piece}]] of merged_prompt has no column in it.",
                expected="a `{column}` in every optional section, which is left out where that is empty.",
                fix="Name a column there, or take the [[ and ]] away.",
            )
        sections.append(section)
    return sections


def _parts(piece: str, prompt: str) -> Iterator[str | _Column]:
    end = 0
    for match in _BRACES.finditer(piece):
        yield piece[end : match.start()]
        end = match.end()
        if match[0] in "{}":
            raise OptionError(
                f"merged_prompt has a single {match[0]!r}: {prompt!r}.",
                expected="`{column}` for a column's value, `{{` and `}}` for braces.",
                fix="Write it twice, or close it.",
            )
        yield _Column(match[1]) if match[1] else match[0][0]
    yield piece[end:]


def _require_columns(prompt: Sequence[_Section], columns: Sequence[str]) -> None:
    wanted = [column for section in prompt for column in section.columns]
    if not wanted:
        raise OptionError(
            "merged_prompt names no column: every question would be the same.",
            expected="`{column}` where a column's value belongs.",
            fix=f"Name one of the dataset's columns: {list(columns)}.",
        )
    for column in wanted:
        if column not in columns:
            raise DatasetError(
                f"merged_prompt names the column {column!r}, and the dataset has {list(columns)}.",
                expected="names of columns in braces.",
                fix=f"Correct the name; braces that are meant as such are written twice.{nearest(column, columns)}",
            )


def _text(value: Any, index: int, column: str) -> str:
    if isinstance(value, str):
        return value
    if _is_empty(value) or not isinstance(value, int | float):
        found = "nothing" if _is_empty(value) else f"a {type(value).__name__}"
        fix = f"Put {{{column}}} into an optional section, [[like this: {{{column}}}]], or correct that row."
        raise bad_row(index, f"has {found} in {column!r}", "a text or a number", fix)
    return str(value)


def _is_empty(value: Any) -> bool:
    """None, a text of nothing but white space, or NaN, which is how tables have an absent number."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
