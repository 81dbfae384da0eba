"""metrics.jsonl: the first line has the settings, each other one a record."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.folders import cannot_write, refuse_strangers
from jaxtune.log import get_logger

log = get_logger(__name__)

FILE = "metrics.jsonl"
REPORT = "report.html"
COMPLETIONS_FILE = "completions.jsonl"
"""What a GRPO run may write beside it."""


class MetricsFile:
    """A `Tracker`. Nothing is left of an earlier run's files; one that is resumed writes again what it had written."""

    def __init__(self, folder: Path, history: Sequence[Mapping[str, Any]] = (), resumed: bool = False):
        self.path, self.history, self.resumed = folder / FILE, history, resumed

    def begin(self, settings: Mapping[str, Any]) -> None:
        folder = self.path.parent
        if not any(folder.glob("checkpoint-*")):  # which are ours, wherever they were copied from
            refuse_strangers(folder, marker=FILE)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.is_file() and not self.resumed:
                log.info("%s is replaced: it was of an earlier run.", self.path)
            for name in (FILE, COMPLETIONS_FILE, REPORT):
                (folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        self._write([{"settings": settings}, *self.history])

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self._write([record])

    def end(self) -> None: ...

    def _write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        try:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line, default=str) + "\n" for line in lines)
        except OSError as error:
            raise cannot_write(self.path, error) from error
