"""Which curves a run has, by its records, and a figure of them by matplotlib. (For a report, `svg.py` draws them.)"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtune.folders import cannot_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
"""One of a trainer's `log_history`."""
Points = list[tuple[float, float]]
"""Optimizer steps and values."""


class Panel(NamedTuple):
    title: str
    lines: dict[str, Points]
    """By their names."""


_PANELS = {
    "loss": r"loss|eval_(.*_)?loss",
    "reward": r"reward|rewards/.*/mean",
    "completion length": r"completions/mean_length",
    "gradient norm": r"grad_norm",
    "learning rate": r"learning_rate",
    "tokens per second": r"tokens_per_second",
    "divergence from the base": r"kl",
}
"""What is drawn together, by patterns of names. Most wanted first."""


def points(history: Sequence[Record], name: str) -> Points:
    return [(record["step"], record[name]) for record in history if name in record]


def panels(history: Sequence[Record]) -> list[Panel]:
    """All that the records have something for."""
    names = list(dict.fromkeys(name for record in history for name in record))
    found = {
        title: {name: points(history, name) for name in names if re.fullmatch(pattern, name)}
        for title, pattern in _PANELS.items()
    }
    return [Panel(title, lines) for title, lines in found.items() if lines]


def figure(panels: Sequence[Panel], columns: int = 3) -> "Figure":
    """Side by side, over optimizer steps. A notebook shows it, with or without pyplot."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=90)
            return data.getvalue()

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    drawn = Shown(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    places = drawn.subplots(rows, columns, squeeze=False).flat
    for panel, axes in zip(panels, places, strict=False):
        for name, line in panel.lines.items():
            axes.plot(*zip(*line, strict=True), marker="." if len(line) < 50 else "", label=name)
        axes.set(title=panel.title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(panel.lines) > 1:
            axes.legend()
    for axes in places:  # those that are left over
        axes.remove()
    return drawn


def draw(panels: Sequence[Panel], path: Path) -> None:
    """As a PNG."""
    try:
        figure(panels).savefig(path, dpi=120)
    except OSError as error:
        raise cannot_write(path, error) from error
