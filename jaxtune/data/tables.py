"""Changing a dataset row by row, as what it is: a list of dicts stays a list of dicts, a `datasets.Dataset` stays one
(on disk, cached by its content), and a `datasets.IterableDataset` is changed while it is read."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtune.data.rows import Row, bad_row
from jaxtune.errors import DatasetError, nearest

type Change = Callable[[Row, int], dict[str, Any]]
"""From a row and its index, which messages name, to its new columns."""


def map_rows(dataset: Any, change: Change, *, drop_others: bool = False, description: str) -> Any:
    """The dataset, one that has `column_names`, with the columns that `change` makes of each row: beside the row's
    other columns or, with `drop_others`, instead of them."""
    if is_table(dataset):
        options: dict[str, Any] = {"remove_columns": column_names(dataset)} if drop_others else {}
        if hasattr(dataset, "__len__"):  # streams have no progress bar, and refuse a name for it
            options["desc"] = description
        return dataset.map(change, with_indices=True, **options)
    changed = []
    for index, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise bad_row(index, f"is a {type(row).__name__}", "a dict of columns", "Correct that row.")
        changed.append({**({} if drop_others else row), **change(row, index)})
    return changed


def is_table(dataset: Any) -> bool:
    """Whether this is a `Dataset` or `IterableDataset` of `datasets`, which whoever has one has imported."""
    return hasattr(dataset, "column_names") and hasattr(dataset, "map") and not isinstance(dataset, Mapping)


def column_names(dataset: Any) -> list[str]:
    """Of a table, or of a list's first row. Anything else is refused here."""
    if is_table(dataset):
        return list(dataset.column_names or next(iter(dataset), {}))  # a stream may not know them
    if not isinstance(dataset, list | tuple) or not dataset or not isinstance(dataset[0], Mapping):
        found = f"is a {type(dataset).__name__}"
        fix = 'Pass a split, such as `dataset["train"]`, or `list(...)` of rows that can be iterated over.'
        if hasattr(dataset, "itertuples"):  # of pandas
            fix = 'Pass its rows: `dataset.to_dict("records")`.'
        if isinstance(dataset, Mapping):
            found = f"is a mapping with the keys {list(dataset)}"
        elif isinstance(dataset, list | tuple):
            found = f"is a list of {type(dataset[0]).__name__}" if dataset else "has no rows"
        raise DatasetError(
            f"the dataset {found}.",
            expected="one split: a `datasets.Dataset`, or a list of dicts.",
            fix=fix,
        )
    return list(dataset[0])


def column_among(dataset: Any, wanted: Sequence[str], fix: str) -> str:
    """The first of the wanted columns that the dataset has."""
    columns = column_names(dataset)
    found = next((column for column in wanted if column in columns), None)
    if found is None:
        hints = (nearest(column, wanted) for column in columns)
        raise DatasetError(
            f"the dataset has the columns {columns}.",
            expected=f"a column {' or '.join(map(repr, wanted))}.",
            fix=fix + next((hint for hint in hints if hint), ""),
        )
    return found
