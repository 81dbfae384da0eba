"""Other people's trackers: TensorBoard, Weights & Biases, Trackio. Each is imported when it is asked for, and none of
them ends a run."""

import datetime
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from jaxtune.errors import OptionError, nearest
from jaxtune.log import get_logger

log = get_logger(__name__)


class Tracker(Protocol):
    """Sees a run's settings, then its records, then its end."""

    def begin(self, settings: Mapping[str, Any]) -> None: ...
    def log(self, step: int, record: Mapping[str, Any]) -> None: ...
    def end(self) -> None: ...


class Known:
    """A tracker that a package brings. `name` is the run's, and may be None."""

    package: ClassVar[str]

    def __init__(self, name: str | None, project: str, folder: Path | None):
        self.name, self.project, self.folder = name, project, folder
        self.module = importlib.import_module(self.package)


class TensorBoard(Known):
    """Event files in `folder`."""

    package = "tensorboardX"

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.writer = self.module.SummaryWriter(str(self.folder))
        self.writer.add_text("settings", f"```\n{json.dumps(settings, indent=1, default=str)}\n```", 0)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in grouped(record).items():
            self.writer.add_scalar(name, value, step)

    def end(self) -> None:
        self.writer.close()


class WandB(Known):
    package = "wandb"

    def begin(self, settings: Mapping[str, Any]) -> None:
        project = os.environ.get("WANDB_PROJECT", self.project)  # as wandb's own users set it
        self.run = self.module.init(project=project, name=self.name, config=dict(settings))
        # An evaluation may come after a later step's line, which wandb's own count of steps would refuse.
        self.run.define_metric("*", step_metric="train/global_step", step_sync=True)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self.run.log({**grouped(record), "train/global_step": step})

    def end(self) -> None:
        self.run.finish()


class Trackio(Known):
    package = "trackio"

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.module.init(project=self.project, name=self.name, config=dict(settings))

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self.module.log(grouped(record), step=step)

    def end(self) -> None:
        self.module.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
}
"""By the names that `report_to` has for them, which are those of jaxtune's extras too."""


class Lenient:
    """A tracker whose failures (a network that is down, a disk) do not end the run: the first is said. One that could
    not begin is left alone."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker = name, tracker
        self.has_begun = self.was_said = False

    def begin(self, settings: Mapping[str, Any]) -> None:
        self.has_begun = self._does("begin", settings)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        if self.has_begun:
            self._does("log", step, record)

    def end(self) -> None:
        if self.has_begun:
            self._does("end")

    def _does(self, what: str, *args: Any) -> bool:
        try:
            getattr(self.tracker, what)(*args)
        except Exception as error:
            if not self.was_said:
                detail = f"{type(error).__name__}: {error}"
                log.warning("%s failed, and the run goes on without it: %s (said once)", self.name, detail)
            self.was_said = True
            return False
        return True


def names_of(report_to: str | Sequence[str] | None) -> tuple[str, ...]:
    """The trackers that are meant: none for "none", for "all" those whose packages are installed."""
    given = [report_to] if isinstance(report_to, str) else list(report_to or [])
    if given == ["all"]:
        return tuple(name for name, tracker in TRACKERS.items() if _is_installed(tracker.package))
    names = tuple(dict.fromkeys(name for name in given if name != "none"))
    for name in names:
        if name not in TRACKERS:
            known = (*TRACKERS, "all", "none")
            raise OptionError(
                f"report_to has {name!r}.",
                expected=f"one of {', '.join(known)}, or a list of them.",
                fix=f"Correct report_to, or leave it out: metrics.jsonl has all numbers.{nearest(str(name), known)}",
            )
    return names


def require_packages(names: Sequence[str]) -> None:
    for name in names:
        package = TRACKERS[name].package
        if not _is_installed(package):
            raise OptionError(
                f"report_to has {name!r}, and the package {package} is not installed.",
                expected=f"jaxtune's extra {name}, which brings it.",
                fix=f"pip install 'jaxtune[{name}]', or leave report_to out: metrics.jsonl has all numbers.",
            )


def open_trackers(
    names: Sequence[str], *, name: str | None, project: str, folder: Path | None
) -> list[Tracker]:
    """`folder` is where one that writes files puts them."""
    require_packages(names)
    return [Lenient(each, TRACKERS[each](name, project, folder)) for each in names]


def event_folder(output_dir: Path, name: str | None) -> Path:
    """A new one for each run, or runs would lie over one another in one curve."""
    now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return output_dir / "runs" / (re.sub(r"[^\w.-]+", "_", name) if name else now)


def grouped(record: Mapping[str, Any]) -> dict[str, float]:
    """A record's numbers as transformers' trainer names them for trackers: train/loss, eval/loss."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float)
    }


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
