"""KeepingConfig: the settings of a run that is evaluated, saved and resumed, under transformers' names."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from jaxtune.training.seeing_config import SeeingConfig

EVAL_STRATEGIES = ("no", "steps", "epoch")
SAVE_STRATEGIES = ("no", "steps", "epoch", "best")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeepingConfig(SeeingConfig):
    eval_strategy: str = "no"
    """When the eval_dataset's loss is taken: no, steps (every eval_steps, and at the end) or epoch."""
    eval_steps: float | None = None
    """Steps between two evaluations; below 1, a part of all steps. None takes logging_steps."""
    eval_on_start: bool = False
    """Evaluate before the first step as well."""
    per_device_eval_batch_size: int = 4
    """Samples in a batch of an evaluation."""
    save_strategy: str = "steps"
    """When a checkpoint is written to output_dir: no, steps (every save_steps, and at the end), epoch, or best (when
    metric_for_best_model is)."""
    save_steps: float = 500
    """Steps between two checkpoints; below 1, a part of all steps."""
    save_total_limit: int | None = None
    """Checkpoints that are kept, the newest and the best among them; None keeps all."""
    save_only_model: bool = False
    """Write into a checkpoint what other programs load, and not the state to resume from. After full fine-tuning these
    are all weights, which other checkpoints hold in their state alone."""
    load_best_model_at_end: bool = False
    """Leave in the model what the best of the evaluated checkpoints holds."""
    metric_for_best_model: str | None = None
    """What is best: a metric of an evaluation, with or without its "eval_". None is the loss."""
    greater_is_better: bool | None = None
    """Whether more of it is better; None says no for a loss, and else yes."""
    resume_from_checkpoint: str | Path | bool | None = None
    """A checkpoint's folder, or True for the newest in output_dir: the run goes on from there."""

    def __post_init__(self):
        super().__post_init__()
        self.require_one_of(EVAL_STRATEGIES, "eval_strategy")
        self.require_one_of(SAVE_STRATEGIES, "save_strategy")
        self.require_counts("per_device_eval_batch_size")
        self.require_counts("save_total_limit", or_none=True)
        self.require_switches("eval_on_start", "load_best_model_at_end", "save_only_model")
        has_state = not (self.save_only_model and self.load_best_model_at_end)
        self.require(has_state, "save_only_model", "False with load_best_model_at_end, which loads a state")
        for name in ("eval_steps", "save_steps"):
            value = getattr(self, name)
            steps = "a whole number of steps, or a part of all steps below 1"
            is_steps = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
            is_none = value is None and name == "eval_steps"
            self.require(is_none or (is_steps and (value < 1 or value == int(value))), name, steps)
        resumes = isinstance(self.resume_from_checkpoint, str | Path | bool | None)
        self.require(resumes, "resume_from_checkpoint", "a path, True, or None")
        needs_best = self.load_best_model_at_end or self.save_strategy == "best"
        if needs_best:
            self.require(
                self.output_dir is not None, "output_dir", "a folder, where the best checkpoint can wait"
            )
            self.require(self.eval_strategy != "no", "eval_strategy", "steps or epoch, to know what is best")
        if self.load_best_model_at_end and self.save_strategy != "best":
            self._require_saved_where_evaluated()
        if needs_best or self.metric_for_best_model is not None:
            metric = self.metric_for_best_model or "loss"
            self._resolve("metric_for_best_model", metric)
            if self.greater_is_better is None:
                self._resolve("greater_is_better", not metric.endswith("loss"))

    def _require_saved_where_evaluated(self) -> None:
        self.require(
            self.save_strategy == self.eval_strategy,
            "save_strategy",
            f"eval_strategy's {self.eval_strategy!r}, so that the best one is there at the end",
        )
        if self.save_strategy == "steps":
            every = self.eval_steps or self.logging_steps
            self.require(
                math.isclose(self.save_steps / every, round(self.save_steps / every))
                and self.save_steps >= every,
                "save_steps",
                f"a multiple of the {every} steps between evaluations",
            )

    def _resolve(self, name: str, value: object) -> None:
        """What None stands for; callbacks that were written for transformers look it up here."""
        object.__setattr__(self, name, value)

    def evaluates(self, step: int, total_steps: int, epoch_ends: bool) -> bool:
        every = self.eval_steps or self.logging_steps
        return _is_due(self.eval_strategy, every, step, total_steps, epoch_ends)

    def saves(self, step: int, total_steps: int, epoch_ends: bool) -> bool:
        return _is_due(self.save_strategy, self.save_steps, step, total_steps, epoch_ends)

    def metric_of(self, metrics: Mapping[str, float]) -> float:
        """What is best among an evaluation's metrics."""
        name = self.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        self.require(
            name in metrics,
            "metric_for_best_model",
            f"a metric of the evaluations: {', '.join(sorted(metrics))}",
        )
        return metrics[name]


def _is_due(strategy: str, every: float, step: int, total_steps: int, epoch_ends: bool) -> bool:
    if strategy == "epoch":
        return epoch_ends
    every = math.ceil(every * total_steps) if every < 1 else int(every)
    return strategy == "steps" and (step % every == 0 or step == total_steps)
