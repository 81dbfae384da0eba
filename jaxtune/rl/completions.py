"""The table of completions that a run writes, and what reward functions add to it and to the log."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import RewardError
from jaxtune.folders import cannot_write
from jaxtune.reporting.metrics_file import COMPLETIONS_FILE

OWN_COLUMNS = ("step", "prompt", "completion", "advantage")
OWN_METRICS = (
    "step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "trained_tokens", "num_tokens", "samples",
    "step_time_sec", "compile_seconds", "tokens_per_second", "mfu", "peak_device_bytes", "reward", "reward_std",
    "frac_reward_zero_std", "kl", "entropy",
)  # fmt: skip
OWN_PREFIXES = ("rewards/", "completions/", "clip_ratio/")
"""What the trainer itself says, and reward functions may not say in its place."""


class Logged:
    """What reward functions say beside their rewards, by `log_extra` and `log_metric`, in one step."""

    def __init__(self, num_completions: int):
        self.num_completions = num_completions
        self.columns: dict[str, list[Any]] = {}
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)

    def extra(self, column: str, values: Sequence[Any]) -> None:
        """Adds a column to the table: a value for each completion."""
        _refuse_own(f"log_extra({column!r}, ...)", column, OWN_COLUMNS)
        if len(values) != self.num_completions:
            raise RewardError(
                f"log_extra({column!r}, ...) was given {len(values)} values for {self.num_completions} completions.",
                expected="one for each completion.",
                fix="Correct what the reward function passes.",
            )
        self.columns[column] = list(values)

    def metric(self, name: str, value: float) -> None:
        """Adds a number to the log: the mean of what a step said under its name."""
        _refuse_own(f"log_metric({name!r}, ...)", name, OWN_METRICS)
        if not math.isfinite(number := float(value)):
            raise RewardError(
                f"log_metric({name!r}, {value!r}).",
                expected="a finite number.",
                fix="Say nothing where there is no number.",
            )
        self._metrics[name].append(number)

    @property
    def means(self) -> dict[str, float]:
        return {name: sum(values) / len(values) for name, values in self._metrics.items()}


def _refuse_own(call: str, name: str, own: Sequence[str]) -> None:
    if name in own or name.startswith(OWN_PREFIXES):
        raise RewardError(
            f"{call} takes a name that the trainer uses itself.",
            expected=f"another name than {', '.join(own)}, and none that begins with {' or '.join(OWN_PREFIXES)}.",
            fix="Choose another name.",
        )


def table(
    said: Mapping[str, Sequence[Any]], worth: Mapping[str, np.ndarray], extra: Mapping[str, Sequence[Any]]
) -> list[dict[str, Any]]:
    """A row for each completion."""
    columns = {**said, **worth, **extra}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def write(folder: Path, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds a step's table to the run's file."""
    lines = (json.dumps(_plain({"step": step, **row}), ensure_ascii=False, default=str) for row in rows)
    try:
        with (folder / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise cannot_write(folder / COMPLETIONS_FILE, error) from error


def _plain(value: Any) -> Any:
    """As JSON has it: numpy's numbers as numbers, and None for one that is not finite."""
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value
