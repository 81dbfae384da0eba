"""Curves of a run as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxtune.folders import cannot_write

Record = dict[str, float]


class Curve(NamedTuple):
    title: str
    history: Sequence[Record]
    """A trainer's `log_history`."""
    name: str
    """Which of its numbers is drawn."""


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Side by side, over optimizer steps."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(5 * len(curves), 3.2), layout="constrained")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        steps = [record["step"] for record in curve.history]
        axes.plot(steps, [record[curve.name] for record in curve.history], marker=".", color="tab:blue")
        axes.set(title=curve.title, xlabel="step", ylabel=curve.name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise cannot_write(path, error) from error
