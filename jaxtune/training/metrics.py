"""What a run shows and leaves behind: a progress bar, a line in the log for every logged step, and metrics.jsonl."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from jaxtune.folders import cannot_write, refuse_strangers
from jaxtune.log import get_logger
from jaxtune.progress import progress_bar
from jaxtune.training.callbacks import RunState
from jaxtune.training.config import TrainingConfig
from jaxtune.training.loop import Record

log = get_logger(__name__)

FILE = "metrics.jsonl"
COMPLETIONS_FILE = "completions.jsonl"
"""What a GRPO run may write beside it: it belongs to the same run, and goes when the next one begins."""


NOT_AVERAGED = ("step", "epoch", "num_tokens", "learning_rate", "grad_norm")
"""Of several records, the last one's counts."""


def average(records: Sequence[Record]) -> Record:
    """One record for several steps: means over those that have the number."""
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record[name] for record in records if name in record] for name in names}
    return {
        name: each[-1] if name in NOT_AVERAGED else sum(each) / len(each) for name, each in values.items()
    }


@dataclasses.dataclass
class Tally:
    """What a run adds up. All of it is plain, so that a checkpoint can hold it as JSON."""

    steps: int = 0
    samples: float = 0.0
    loss_sum: float = 0.0
    unlogged: list[Record] = dataclasses.field(default_factory=list)
    """Of the steps since the last line of the log."""

    def add(self, record: Record) -> None:
        self.steps += 1
        self.samples += record.pop("samples")
        self.loss_sum += record["loss"]
        self.unlogged.append(record)

    def average(self) -> Record:
        """One record for the steps since the last."""
        records, self.unlogged = self.unlogged, []
        return average(records)


class RunLog:
    """A context manager around a run. The first line of metrics.jsonl has the settings, each other one a step. Of a
    step's numbers, those of `headline` come first, and stand beside the progress bar."""

    def __init__(self, config: TrainingConfig, state: RunState, headline: Sequence[str] = ("loss",)):
        done, history = state.global_step, state.log_history
        self.headline = headline
        self.file = None if config.output_dir is None else _begin(Path(config.output_dir), resumed=done > 0)
        settings = dataclasses.asdict(config) | {"output_dir": str(config.output_dir)}
        self._write_line({"settings": settings})
        for record in history:
            self._write_line(record)
        self.above_the_bar = logging_redirect_tqdm([logging.getLogger("jaxtune")])
        self.bar = progress_bar(total=state.max_steps, initial=done, unit="step")

    def write(self, record: Record) -> None:
        self._write_line(record)
        first = {name: f"{record[name]:.4f}" for name in self.headline if name in record}
        log.info(
            "step %d/%d (epoch %.2f): %s, grad_norm %.3f, lr %.2e, %.0f tokens/s",
            record["step"],
            self.bar.total,
            record["epoch"],
            ", ".join(f"{name} {value}" for name, value in first.items()),
            record["grad_norm"],
            record["learning_rate"],
            record["tokens"] / record["step_time_sec"],
        )
        self.bar.set_postfix(first)

    def write_evaluation(self, record: Record) -> None:
        self._write_line(record)
        log.info(
            "evaluated at step %d: %s",
            record["step"],
            ", ".join(f"{name} {value:.4f}" for name, value in record.items() if name.endswith("loss")),
        )

    def _write_line(self, content: dict[str, Any]) -> None:
        if self.file is None:
            return
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(content) + "\n")
        except OSError as error:
            raise cannot_write(self.file, error) from error

    def advance(self) -> None:
        self.bar.update()

    def __enter__(self) -> "RunLog":
        self.above_the_bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.above_the_bar.__exit__(None, None, None)
        self.bar.close()


def _begin(folder: Path, resumed: bool) -> Path:
    """The path of the run's file. Nothing is left of an earlier run's."""
    if not any(folder.glob("checkpoint-*")):  # which are ours, wherever they were copied from
        refuse_strangers(folder, marker=FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / FILE).is_file() and not resumed:
            log.info("%s is replaced: it was of an earlier run.", folder / FILE)
        for name in (FILE, COMPLETIONS_FILE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder / FILE
