"""SeeingConfig: the settings of what is seen of a run, while it goes on and afterwards; under transformers' names where
it has them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxtune.reporting.trackers import event_folder, names_of
from jaxtune.training.config import TrainingConfig

LOGGING_STRATEGIES = ("no", "steps", "epoch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeeingConfig(TrainingConfig):
    logging_strategy: str = "steps"
    """When there is a line of the log, which holds the means over the steps since the last: steps (every
    logging_steps, and at the end), epoch, or no (never: evaluations alone are in the log)."""
    logging_steps: int = 1
    """Steps between two lines."""
    logging_first_step: bool = False
    """A line after the first step as well."""
    disable_tqdm: bool | None = None
    """True shows no progress bar, False shows it into a file too; None shows it where somebody looks on."""
    report_to: str | Sequence[str] | None = "none"
    """Trackers that get the log too: tensorboard, wandb, trackio, a list of them, all (that are installed) or none."""
    run_name: str | None = None
    """What trackers and the report call the run."""
    project: str = "jaxtune"
    """What wandb (unless WANDB_PROJECT says otherwise) and trackio call what the run is a part of."""
    logging_dir: str | Path | None = None
    """Where TensorBoard's files go; None is a folder for each run in output_dir/runs."""
    report_samples: int = 0
    """So many prompts are answered greedily before and after the run, and shown in report.html: the first of the
    eval_dataset where there is one, else of the train_dataset. Of a conversation, everything before the last answer."""
    profile_steps: Sequence[int] | None = None
    """The first and the last step of a stretch that jax's profiler traces, into output_dir/profile."""

    def __post_init__(self):
        super().__post_init__()
        self.require_one_of(LOGGING_STRATEGIES, "logging_strategy")
        self.require_counts("logging_steps")
        self.require_switches("logging_first_step")
        self.require(self.disable_tqdm in (None, True, False), "disable_tqdm", "True, False or None")
        self.require(isinstance(self.report_to, str | Sequence | None), "report_to", "a name, or a list")
        for name in ("run_name", "project"):
            self.require(isinstance(getattr(self, name), str | None), name, "a text")
        self.require(isinstance(self.logging_dir, str | Path | None), "logging_dir", "a path, or None")
        if "tensorboard" in names_of(self.report_to):
            self.require(
                self.event_folder is not None,
                "logging_dir",
                "a folder for the files of report_to='tensorboard', or an output_dir",
            )
        samples = self.report_samples
        counted = isinstance(samples, int) and not isinstance(samples, bool) and samples >= 0
        self.require(counted, "report_samples", "a whole number of at least 0")
        if self.report_samples:
            self.require(
                self.output_dir is not None, "report_samples", "0 without an output_dir for report.html"
            )
        if self.profile_steps is not None:
            self._require_stretch()

    def _require_stretch(self) -> None:
        steps = self.profile_steps
        in_order = (
            isinstance(steps, Sequence)
            and len(steps) == 2
            and all(type(n) is int for n in steps)
            and 1 <= steps[0] <= steps[1]
        )
        self.require(in_order, "profile_steps", "the first and the last step, such as (5, 8)")
        self.require(self.output_dir is not None, "profile_steps", "None without an output_dir to write to")

    @property
    def event_folder(self) -> Path | None:
        """Where a tracker that writes files puts them."""
        if self.logging_dir is not None:
            return Path(self.logging_dir)
        return None if self.output_dir is None else event_folder(Path(self.output_dir), self.run_name)

    def writes_line(self, step: int, total_steps: int, epoch: float) -> bool:
        """Whether there is a line of the log once this step is done."""
        by_epoch = self.logging_strategy == "epoch"
        due = float(epoch).is_integer() if by_epoch else step % self.logging_steps == 0
        return due or step == total_steps or (self.logging_first_step and step == 1)
