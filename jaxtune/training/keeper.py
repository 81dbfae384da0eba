"""Keeper: what of a run is evaluated, saved, found best and resumed."""

import copy
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtune.data.batches import BatchStream
from jaxtune.data.sample import Item
from jaxtune.errors import CheckpointError
from jaxtune.log import get_logger
from jaxtune.training.checkpoints import Checkpoints, find, fingerprint, read_run, read_state, saved_by
from jaxtune.training.config import TrainingConfig
from jaxtune.training.evaluation import evaluate_all, metric_names
from jaxtune.training.keeping_config import KeepingConfig
from jaxtune.training.loop import Record
from jaxtune.training.optimizers import averaged
from jaxtune.training.seeing_config import SeeingConfig
from jaxtune.training.step import TrainState

if TYPE_CHECKING:
    from jaxtune.training.running import Run

log = get_logger(__name__)

EvalSets = Mapping[str, Sequence[Item]]
"""By the prefix of their metrics: "eval", or "eval_<name>" for each of several."""

_RESTORED = (
    "global_step", "epoch", "log_history", "best_metric", "best_global_step", "best_model_checkpoint",
)  # fmt: skip
_FREE = (
    set(SeeingConfig.__dataclass_fields__) - set(TrainingConfig.__dataclass_fields__)
) | {
    "output_dir", "num_train_epochs", "gradient_checkpointing", "cache_tokens", "eval_strategy", "eval_steps",
    "eval_on_start", "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "eval_packing",
    "pad_token", "offload_optimizer", "skip_nonfinite_steps", "save_only_model",
}  # fmt: skip
"""Settings that a resumed run may have otherwise, and go on as before."""


class Keeper:
    """Of one run. `begin` comes first, `end` or `abandon` last."""

    def __init__(
        self,
        args: KeepingConfig,
        model: Any,
        tokenizer: Any,
        stream: BatchStream,
        eval_sets: EvalSets,
        resume_from: str | Path | bool | None = None,
    ):
        self.args, self.model, self.tokenizer, self.stream, self.eval_sets = (
            args,
            model,
            tokenizer,
            stream,
            eval_sets,
        )
        self.resume_from = args.resume_from_checkpoint if resume_from is None else resume_from
        self.folder = None if args.output_dir is None else Path(args.output_dir)
        saves = self.folder is not None and args.save_strategy != "no"
        self.checkpoints = None
        if saves and self.folder:
            with_state = not args.save_only_model
            self.checkpoints = Checkpoints(self.folder, args.save_total_limit, with_state=with_state)
        self.last_checkpoint: Path | None = None
        """What this run can go on from."""
        self.run_began = time.time()
        """By which its checkpoints are told from another run's. A resumed run began when it first did."""
        self._evaluated_at = self._saved_at = -1

    def begin(self, run: "Run") -> None:
        """Puts the run back to where the checkpoint to resume from has it, if there is one."""
        self.run = run
        if self.args.metric_for_best_model is not None and self.eval_sets:  # a typo is noticed now
            self.args.metric_of(dict.fromkeys(metric_names(self.eval_sets), 0.0))
        if self.resume_from is None or self.resume_from is False:
            return
        state = run.state
        path = self.last_checkpoint = find(self.resume_from, self.folder)
        found = read_run(path, self.model.causal_lm)
        self._compare_settings(path, found["settings"])
        if found["global_step"] >= state.max_steps:
            log.warning(
                "%s is of step %d: the run's %d steps are done.", path, found["global_step"], state.max_steps
            )
        for name in _RESTORED:
            setattr(state, name, found[name])
        self.run_began = found.get("run_began", 0.0)
        for name, value in found["tally"].items():
            setattr(run.tally, name, value)
        self.stream.restore(found["data"])
        if found["samples"] != self._samples:
            raise CheckpointError(
                f"{path} is of a run over other samples, or with other tokens trained on.",
                expected="the dataset, its preparation and the masks of the run that is resumed.",
                fix="Restore them, train_on_responses_only and packing among them; or begin anew from the adapter in "
                "that folder.",
            )
        log.info("resuming from %s, after %d of %d steps", path, state.global_step, state.max_steps)
        run.trained.take(read_state(path, run.trained.state))

    def _compare_settings(self, path: Path, before: Mapping[str, Any]) -> None:
        now = self._settings()
        if before["optim"] != now["optim"]:
            raise CheckpointError(
                f"{path} was saved with optim={before['optim']!r}, and now it is {now['optim']!r}.",
                expected="the optimizer whose state the checkpoint holds.",
                fix=f"Set optim={before['optim']!r}; or begin anew from the adapter in that folder.",
            )
        for name, value in now.items():
            if before.get(name) != value:
                log.warning(
                    "%s was saved with %s=%r, and now it is %r: the run goes on differently.",
                    path, name, before.get(name), value,
                )  # fmt: skip

    def _settings(self) -> dict[str, Any]:
        """Those that decide about the losses, as JSON has them."""
        settings = {name: value for name, value in dataclasses.asdict(self.args).items() if name not in _FREE}
        return json.loads(json.dumps(settings | {"max_steps": self.run.state.max_steps}, default=str))

    @functools.cached_property
    def _samples(self) -> str:
        return self.stream.fingerprint()

    def saved(self) -> list[Path]:
        """The run's own checkpoints that are there."""
        return [] if self.folder is None else saved_by(self.run_began, self.folder)

    @property
    def saves(self) -> bool:
        return self.checkpoints is not None

    def before_training(self) -> None:
        if self.args.eval_on_start and self.run.state.global_step == 0:
            self._evaluate()

    def after_step(self, settle: Callable[[], None], epoch_ends: bool, ends: bool) -> None:
        """Evaluates and saves if it is time to, or a callback asks for it; and saves if the run `ends` early."""
        state, callbacks = self.run.state, self.run.callbacks
        when = (state.global_step, state.max_steps, epoch_ends)
        if callbacks.asked("should_evaluate") or (self.args.evaluates(*when) and self.eval_sets):
            settle()
            is_best = self._evaluate()
        else:
            is_best = False
        due = self.args.saves(*when) or (is_best and self.args.save_strategy == "best")
        if self.checkpoints is not None and (callbacks.asked("should_save") or due or ends):
            settle()
            self._save()

    def _evaluate(self) -> bool:
        """Whether it was the best so far."""
        params, lora = self.run.trained.left()
        batch_size = self.args.per_device_eval_batch_size
        metrics = evaluate_all(self.model.causal_lm, params, lora, self.eval_sets, batch_size)
        self.run.evaluated(metrics)
        return self._note_best(metrics)

    def _note_best(self, metrics: Record) -> bool:
        if self.args.metric_for_best_model is None and "eval_loss" not in metrics:
            return False  # several datasets, and nobody said which counts
        state = self.run.state
        value, best = self.args.metric_of(metrics), state.best_metric
        is_best = best is None or (value > best if self.args.greater_is_better else value < best)
        if is_best:
            state.best_metric, state.best_global_step = value, state.global_step
        return is_best

    def _save(self) -> None:
        assert self.checkpoints is not None and self.folder is not None
        run = self.run
        if run.state.best_global_step == run.state.global_step:
            run.state.best_model_checkpoint = str(self.folder / f"checkpoint-{run.state.global_step}")
        best = run.state.best_model_checkpoint
        content = {
            **dataclasses.asdict(run.state),
            "tally": dataclasses.asdict(run.tally),
            "data": self.stream.state(),
            "samples": self._samples,
            "settings": self._settings(),
            "model": fingerprint(self.model.causal_lm),
            "run_began": self.run_began,
        }
        path = self.checkpoints.save(
            run.trained.state, content, self._save_model, None if best is None else Path(best)
        )
        if self.checkpoints.with_state:
            self.last_checkpoint = path
        run.callbacks.call("on_save")

    def _save_model(self, folder: Path, state: TrainState) -> None:
        """The model for other programs; but whole weights only where no state has them."""
        if self.model.full_finetuning and not self.args.save_only_model:
            return
        with_trained = copy.copy(self.model)
        part = "params" if self.model.full_finetuning else "lora"
        setattr(with_trained, part, averaged(state.trained, state.optimizer))
        tokenizer = self.tokenizer if hasattr(self.tokenizer, "save_pretrained") else None
        with_trained.save_pretrained(folder, tokenizer, verify=False)  # what is exported is what is verified

    def end(self, state: TrainState) -> TrainState:
        """What the run leaves, once all is written: the best checkpoint's state, if that was asked for."""
        if self.checkpoints is not None:
            self.checkpoints.close()
        of = self.run.state
        best = of.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None or of.best_global_step == of.global_step:
            return state
        log.info("loading the best model, of step %s (%s)", of.best_global_step, best)
        return read_state(Path(best), state)

    def abandon(self) -> None:
        """After an error: what is being written is finished, and what went wrong with it said."""
        if self.checkpoints is not None:
            try:
                self.checkpoints.close()
            except Exception as error:
                log.warning("the last checkpoint could not be written: %s", error)
