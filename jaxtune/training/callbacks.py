"""Callbacks around a run, with the hooks, the state and the control that transformers' trainer has: subclass
`TrainerCallback`, or pass what was written for transformers."""

import dataclasses
from typing import Any

from jaxtune.errors import OptionError
from jaxtune.training.loop import Record

HOOKS = (
    "on_train_begin", "on_epoch_begin", "on_step_begin", "on_step_end", "on_log", "on_evaluate", "on_save",
    "on_epoch_end", "on_train_end",
)  # fmt: skip


@dataclasses.dataclass
class RunState:
    """Where a run is. All of it is plain, so that a checkpoint can hold it as JSON."""

    max_steps: int
    num_train_epochs: float
    global_step: int = 0
    epoch: float = 0.0
    log_history: list[Record] = dataclasses.field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True


@dataclasses.dataclass
class TrainerControl:
    """What a callback may set, for the run to look at after a step. All but `should_training_stop` holds once."""

    should_training_stop: bool = False
    should_evaluate: bool = False
    should_save: bool = False


class TrainerCallback:
    """Every hook is called as hook(args, state, control, **more), and may change `control`. A step has ended once it is
    dispatched: what it computed, `state.log_history` has one step later."""

    def on_train_begin(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_epoch_begin(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_step_begin(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_step_end(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_log(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_evaluate(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_save(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_epoch_end(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...
    def on_train_end(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None: ...


class EarlyStoppingCallback(TrainerCallback):
    """Stops a run once so many evaluations in a row have not made the best metric better by more than a threshold."""

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float = 0.0):
        self.patience, self.threshold = early_stopping_patience, early_stopping_threshold
        self.without_progress = 0

    def on_train_begin(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None:
        if getattr(args, "eval_strategy", "no") == "no":
            raise OptionError(
                "EarlyStoppingCallback in a run that is never evaluated.",
                expected="eval_strategy='steps' or 'epoch', and an eval_dataset.",
                fix="Set them, or leave the callback out.",
            )

    def on_evaluate(self, args: Any, state: RunState, control: TrainerControl, **more: Any) -> None:
        value, best = args.metric_of(more["metrics"]), state.best_metric
        progress = best is None or (value - best if args.greater_is_better else best - value) > self.threshold
        self.without_progress = 0 if progress else self.without_progress + 1
        control.should_training_stop |= self.without_progress >= self.patience


class Callbacks:
    """Those of a trainer while it runs, called in their order."""

    def __init__(self, callbacks: list[Any], args: Any, state: RunState, **always: Any):
        self.callbacks = callbacks
        self.args, self.state, self.control, self.always = args, state, TrainerControl(), always

    def call(self, hook: str, **more: Any) -> None:
        for callback in list(self.callbacks):  # one may add another
            function = getattr(callback, hook, None)
            if function is not None:
                function(self.args, self.state, self.control, **self.always, **more)

    def asked(self, what: str) -> bool:
        """Whether a callback asked for it since the last time."""
        was = getattr(self.control, what)
        setattr(self.control, what, False)
        return bool(was)


def find_callback(callbacks: list[Any], wanted: Any) -> Any:
    """It itself, or the first of a class; None if there is none."""
    is_it = lambda one: one is wanted or (isinstance(wanted, type) and isinstance(one, wanted))
    return next(filter(is_it, callbacks), None)


def require_callbacks(callbacks: Any) -> list[Any]:
    """Something with a hook each; a class stands for one of it."""
    is_one = any(hasattr(callbacks, hook) for hook in HOOKS)
    given = [callbacks] if is_one else list(callbacks or [])
    for callback in given:
        if not any(hasattr(callback, hook) for hook in HOOKS):
            raise OptionError(
                f"callbacks has {callback!r}, which has none of a callback's hooks.",
                expected=f"objects (or classes) with some of {', '.join(HOOKS)}.",
                fix="Subclass jaxtune.TrainerCallback.",
            )
    return [each() if isinstance(each, type) else each for each in given]
