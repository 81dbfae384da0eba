"""What a run shows and leaves behind: a progress bar, a line in the log for every logged step, and the same numbers in
metrics.jsonl and whatever tracker was asked for."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from jaxtune.log import get_logger
from jaxtune.progress import progress_bar
from jaxtune.reporting.metrics_file import MetricsFile
from jaxtune.reporting.trackers import Tracker, names_of, open_trackers
from jaxtune.training import speed
from jaxtune.training.callbacks import RunState
from jaxtune.training.loop import Record
from jaxtune.training.seeing_config import SeeingConfig

log = get_logger(__name__)

NOT_AVERAGED = ("step", "epoch", "num_tokens", "learning_rate", "grad_norm", "skipped_steps")
"""Of several records, the last one's counts."""


def average(records: Sequence[Record]) -> Record:
    """One record for several steps: means over those that have the number. What is whole in one record stays so."""
    names = dict.fromkeys(name for record in records for name in record)
    values = {name: [record[name] for record in records if name in record] for name in names}
    return {
        name: each[-1] if name in NOT_AVERAGED or len(each) == 1 else sum(each) / len(each)
        for name, each in values.items()
    }


@dataclasses.dataclass
class Tally:
    """What a run adds up. All of it is plain, so that a checkpoint can hold it as JSON."""

    steps: int = 0
    samples: float = 0.0
    tokens: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    """Of the steps, those that had no finite loss or gradient."""
    unlogged: list[Record] = dataclasses.field(default_factory=list)
    """Of the steps since the last line of the log."""

    def add(self, record: Record) -> None:
        self.steps += 1
        self.samples += record.pop("samples")
        self.tokens += int(record["tokens"])
        record.setdefault("num_tokens", self.tokens)
        if "loss" in record:
            self.loss_sum += record["loss"]
        else:
            self.skipped += 1
            record["skipped_steps"] = self.skipped
        self.unlogged.append(record)

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / max(1, self.steps - self.skipped)

    def average(self) -> Record:
        """One record for the steps since the last."""
        records, self.unlogged = self.unlogged, []
        return average(records)


class RunLog:
    """A context manager around a run. Of a step's numbers, those of `headline` come first, and stand beside the
    progress bar."""

    def __init__(self, args: SeeingConfig, state: RunState, headline: Sequence[str]):
        """The log of a run that is resumed begins with what it had logged before."""
        self.headline, self.settings = headline, plain(args)
        self.trackers: list[Tracker] = []
        if args.output_dir is not None:
            resumed = state.global_step > 0
            self.trackers.append(MetricsFile(Path(args.output_dir), tuple(state.log_history), resumed))
        self.trackers += open_trackers(
            names_of(args.report_to), name=args.run_name, project=args.project, folder=args.event_folder
        )
        self.above_the_bar = logging_redirect_tqdm([logging.getLogger("jaxtune")])
        self.bar = progress_bar(
            total=state.max_steps, initial=state.global_step, unit="step", disable=args.disable_tqdm
        )

    def write(self, record: Record) -> None:
        """Of some steps."""
        self._push(record)
        if "loss" not in record:  # all were skipped, and that was said
            return
        first = [f"{name} {record[name]:.4f}" for name in self.headline if name in record]
        fast = speed.in_words(record)
        slow = [f"grad_norm {record['grad_norm']:.3f}", f"lr {record['learning_rate']:.2e}"]
        where = f"step {record['step']:.0f}/{self.bar.total} (epoch {record['epoch']:.2f})"
        log.info("%s: %s", where, ", ".join([*first, *slow, *fast]))
        self.bar.set_postfix_str(", ".join([*first, *fast]))

    def write_evaluation(self, record: Record) -> None:
        self._push(record)
        losses = [f"{name} {value:.4f}" for name, value in record.items() if name.endswith("loss")]
        log.info("evaluated at step %d: %s", record["step"], ", ".join(losses))

    def write_other(self, record: Record) -> None:
        """What a script or a callback has to say."""
        self._push(record)
        log.info(", ".join(f"{name} {value}" for name, value in record.items()))

    def advance(self) -> None:
        self.bar.update()

    def _push(self, record: Record) -> None:
        for tracker in self.trackers:
            tracker.log(int(record["step"]), record)

    def __enter__(self) -> "RunLog":
        for tracker in self.trackers:
            tracker.begin(self.settings)
        self.above_the_bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.above_the_bar.__exit__(None, None, None)
        self.bar.close()
        for tracker in self.trackers:
            tracker.end()


def plain(settings: Any) -> dict[str, Any]:
    """A config's fields as JSON has them."""
    return _as_json(dataclasses.asdict(settings))


def plain_defaults(settings: Any) -> dict[str, Any]:
    return _as_json({field.name: field.default for field in dataclasses.fields(settings)})


def _as_json(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values, default=str))
