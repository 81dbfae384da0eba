"""A run under way: where it is, its log, its callbacks, and what the keeper does with it."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtune.errors import DivergenceError, JaxtuneError
from jaxtune.training.callbacks import Callbacks, RunState
from jaxtune.training.fitting import FittingStep
from jaxtune.training.keeper import Keeper
from jaxtune.training.loop import Record, run
from jaxtune.training.metrics import RunLog, Tally
from jaxtune.training.profiling import Profiler
from jaxtune.training.run_report import RunReport, Shown
from jaxtune.training.seeing_config import SeeingConfig
from jaxtune.training.speed import Meter
from jaxtune.training.termination import Ending, terminable
from jaxtune.training.trained import Newest, Trainable, Trained

Batches = Callable[[Newest], Iterator[tuple[Mapping[str, Any], Mapping[str, float]]]]
"""Endless batches [A, R, L], each with facts for the log: `epoch` and `samples` among them."""


class Run:
    """Of one `train()`. `keeper` evaluates and saves, where a trainer can."""

    log: RunLog
    end: Ending

    def __init__(
        self,
        args: SeeingConfig,
        model: Trainable,
        trained: Trained,
        total_steps: int,
        *,
        callbacks: list[Any],
        processing_class: Any,
        headline: Sequence[str],
        keeper: Keeper | None,
        shown: Sequence[Shown],
    ):
        """`shown` are prompts for the report."""
        self.args, self.model, self.trained, self.keeper = args, model, trained, keeper
        self.processing_class, self.headline, self.shown = processing_class, headline, shown
        self.state, self.tally = RunState(total_steps, args.num_train_epochs), Tally()
        self.callbacks = Callbacks(
            callbacks, args, self.state, model=model, processing_class=processing_class
        )
        try:
            self.profiler = Profiler(args.profile_steps, args.output_dir, total_steps)
            if keeper is not None:
                keeper.begin(self)
        except JaxtuneError:
            trained.leave()
            raise
        self.begun_at, self.meter = self.state.global_step, Meter()

    def go(self, step: FittingStep, batches: Batches) -> dict[str, float]:
        """To its end; what there is to say of the whole."""
        trained = self.trained
        with (
            RunLog(self.args, self.state, self.headline) as self.log,
            terminable(interrupts=self.keeper is not None and self.keeper.saves) as self.end,
            RunReport(self, self.shown),
            self.profiler,
        ):
            started = time.perf_counter()
            try:
                self._go(step, batches)
            except DivergenceError as error:
                self._abandon()
                raise self._diverged(error) from error
            except BaseException:  # an interrupt, a reward function, a full disk: what was learnt is not lost
                self._abandon()
                if not trained.is_gone:
                    trained.leave()
                raise
            trained.leave()
            summary = self._summary(time.perf_counter() - started)
        self.callbacks.call("on_train_end")
        self.end.obey()
        return summary

    def _go(self, step: FittingStep, batches: Batches) -> None:
        trained, keeper = self.trained, self.keeper
        for hook in ("on_train_begin", "on_epoch_begin", "on_step_begin"):
            self.callbacks.call(hook)
        if keeper is not None:
            keeper.before_training()
        self.profiler.after_step(self.begun_at, settle=lambda: None)
        to_come = max(0, self.state.max_steps - self.begun_at)  # a checkpoint may lie beyond the end
        stream = itertools.islice(batches(trained.newest), to_come)
        run(
            step, trained.state, trained.frozen, stream, self._note, trained.take, self._after_step,
            self.args.skip_nonfinite_steps, step.prepare,
        )  # fmt: skip
        if self.tally.unlogged:  # stopped between two lines
            self._write_line()
        if keeper is not None:
            trained.take(keeper.end(trained.state))

    def say(self, numbers: Record) -> None:
        """What a script or a callback has to say, in the log."""
        self._keep(numbers, self.log.write_other)

    def evaluated(self, metrics: Record) -> None:
        """The keeper's news."""
        self._keep(metrics, self.log.write_evaluation)
        self.callbacks.call("on_evaluate", metrics=metrics)  # with the best before it, as in transformers

    def _note(self, record: Record) -> None:
        """A step's numbers, which come while the next one is under way."""
        self.tally.add(record)
        if self.args.logging_strategy == "no":
            self.tally.unlogged.clear()
        elif self.args.writes_line(self.tally.steps, self.state.max_steps, record["epoch"]):
            self._write_line()
        self.log.advance()

    def _write_line(self) -> None:
        self._keep(self.meter.read(self.tally.average()), self.log.write)

    def _keep(self, numbers: Record, write: Callable[[Record], None]) -> None:
        record = {"step": self.state.global_step, "epoch": self.state.epoch, **numbers}
        self.state.log_history.append(record)
        write(record)
        self.callbacks.call("on_log", logs=record)

    def _after_step(self, facts: Mapping[str, Any], settle: Callable[[], None]) -> bool:
        """Whether to go on."""
        state, callbacks = self.state, self.callbacks
        state.global_step += 1
        state.epoch = facts["epoch"]
        epoch_ends = float(facts["epoch"]).is_integer()
        callbacks.call("on_step_end")
        if epoch_ends:
            callbacks.call("on_epoch_end")
        if self.keeper is not None:
            self.keeper.after_step(settle, epoch_ends, bool(self.end))
        self.profiler.after_step(state.global_step, settle)
        goes_on = not (callbacks.control.should_training_stop or self.end)
        if goes_on and state.global_step < state.max_steps:
            if epoch_ends:
                callbacks.call("on_epoch_begin")
            callbacks.call("on_step_begin")
        return goes_on

    def _abandon(self) -> None:
        if self.keeper is not None:
            self.keeper.abandon()

    def _diverged(self, error: DivergenceError) -> DivergenceError:
        """The same, with what there is to go on from."""
        fix = error.fix
        last = None if self.keeper is None else self.keeper.last_checkpoint
        if last is not None:
            fix += f" The last checkpoint before it is {last}: resume_from_checkpoint takes it."
        elif self.trained.is_all:
            fix += " First load the model again: the weights that it began with are gone."
        return DivergenceError(error.found, expected=error.expected, fix=fix)

    def _summary(self, runtime: float) -> dict[str, float]:
        tally = self.tally
        return {
            "train_runtime": runtime,
            "train_samples_per_second": tally.samples / runtime,
            "train_steps_per_second": (tally.steps - self.begun_at) / runtime,
            "train_loss": tally.mean_loss,
            "epoch": self.state.epoch,
        }
