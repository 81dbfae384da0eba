"""The table of completions that a run writes, and what reward functions add to it and to the log."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import RewardError

FILE = "completions.jsonl"


class Logged:
    """What reward functions say beside their rewards, by `log_extra` and `log_metric`, in one step."""

    def __init__(self, num_completions: int):
        self.num_completions = num_completions
        self.columns: dict[str, list[Any]] = {}
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column to the table: a value for each completion."""
        if len(values) != self.num_completions:
            raise RewardError(
                f"log_extra({column!r}, ...) was given {len(values)} values for {self.num_completions} completions.",
                expected="one for each completion.",
                fix="Correct what the reward function passes.",
            )
        self.columns[column] = list(values)

    def metric(self, name: str, value: float) -> None:
        """Adds a number to the log: the mean of what a step said under its name."""
        self._metrics[name].append(float(value))

    @property
    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}


def table(
    said: Mapping[str, Sequence[Any]], worth: Mapping[str, np.ndarray], extra: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """A row for each completion. Numbers that are NaN become None, as JSON has it."""
    numbers = {name: [None if np.isnan(v) else float(v) for v in values] for name, values in worth.items()}
    columns = {**said, **numbers, **extra}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a step's table to the run's file; the first step begins it anew."""
    with (folder / FILE).open("w" if step == 1 else "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"step": step, **row}, ensure_ascii=False, default=str) + "\n")
