"""`SampleRows`: samples seen as the rows of a dataset, which is where scripts look for what will be trained on."""

from collections.abc import Sequence
from typing import Any, overload

from jaxtune.data.sample import Sample

_COLUMNS = {
    "input_ids": lambda sample: sample.input_ids.tolist(),
    "labels": lambda sample: sample.labels.tolist(),
}


class SampleRows(Sequence[dict[str, list[int]]]):
    """`rows[5]["labels"]`, `rows["labels"]`, `rows[:5]` and `len(rows)`, as of a `datasets.Dataset`. Read only."""

    def __init__(self, samples: Sequence[Sample]):
        self._samples = samples

    @property
    def column_names(self) -> list[str]:
        return list(_COLUMNS)

    def __len__(self) -> int:
        return len(self._samples)

    @overload
    def __getitem__(self, key: int) -> dict[str, list[int]]: ...
    @overload
    def __getitem__(self, key: str) -> list[list[int]]: ...
    @overload
    def __getitem__(self, key: slice) -> Any: ...
    def __getitem__(self, key):
        """A row, a column, or the columns of several rows."""
        if isinstance(key, str):
            return [_COLUMNS[key](sample) for sample in self._samples]
        if isinstance(key, slice):
            part = SampleRows(self._samples[key])
            return {name: part[name] for name in _COLUMNS}
        return {name: values(self._samples[key]) for name, values in _COLUMNS.items()}

    def __repr__(self) -> str:
        return f"SampleRows({len(self)} rows of {', '.join(_COLUMNS)})"
