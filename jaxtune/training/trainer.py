"""What every trainer does: check what it is given, run the loop over its batches, keep the log, leave in the model what
was trained: its adapter, or with full fine-tuning its weights.

A trainer of its own kind adds what its batches are and what its loss is.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import optax

from jaxtune.errors import AdapterError, OptionError
from jaxtune.folders import cannot_write
from jaxtune.loading.tokenizer import require_rows
from jaxtune.log import get_logger, show
from jaxtune.models.layer_loop import Remat
from jaxtune.reporting import curves
from jaxtune.reporting.last_run import LastRun
from jaxtune.reporting.trackers import names_of, require_packages
from jaxtune.training.callbacks import RunState, find_callback, require_callbacks
from jaxtune.training.card_facts import facts_for_card
from jaxtune.training.config import TrainingConfig
from jaxtune.training.fitting import FittingStep
from jaxtune.training.keeper import Keeper
from jaxtune.training.loop import Record
from jaxtune.training.losses import WatchedLoss, of_all_weights
from jaxtune.training.optimizers import make_optimizer, offloaded, own_rates, skipping
from jaxtune.training.remat import compiler_options, level, remat
from jaxtune.training.run_report import Shown
from jaxtune.training.running import Batches, Run
from jaxtune.training.schedules import Schedule, schedule
from jaxtune.training.seeing_config import SeeingConfig
from jaxtune.training.step import CompiledLater, make_step
from jaxtune.training.trained import Trainable, Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = get_logger(__name__)


class TrainOutput(NamedTuple):
    """As transformers has it."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class Trainer:
    """`log_history` is every logged step's numbers."""

    config_type: ClassVar[type[SeeingConfig]]
    args: SeeingConfig
    method: ClassVar[str]
    """In one word, as the hub's tags have it."""
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Of a step's numbers, those that the progress bar shows."""

    def __init__(
        self,
        model: Trainable,
        args: SeeingConfig | None,
        *,
        train_dataset: Any,
        processing_class: Any,
        tokenizer: Any,
        callbacks: Any = None,
    ):
        show()
        name, config = type(self).__name__, self.config_type.__name__
        if not isinstance(args, self.config_type | None):
            raise OptionError(
                f"{name}'s args is a {type(args).__name__}.",
                expected=f"args of the type {config}.",
                fix=f"Pass args={config}(...).",
            )
        if not hasattr(model, "causal_lm"):
            raise OptionError(
                f"{name} was given {'the model ' + repr(model) if isinstance(model, str) else type(model).__name__}.",
                expected="a LanguageModel.",
                fix="Load it first: model, tokenizer = FastLanguageModel.from_pretrained(...), then get_peft_model.",
            )
        if model.lora is None and not model.full_finetuning:
            raise AdapterError(
                "The model has no adapter to train.",
                expected="a model that went through FastLanguageModel.get_peft_model, or was loaded with "
                "full_finetuning=True.",
                fix="Call FastLanguageModel.get_peft_model(model) first.",
            )
        if train_dataset is None:
            raise OptionError(
                f"{name} was given no train_dataset.", expected="a dataset.", fix="Pass train_dataset=..."
            )
        self.model, self.args = model, args or self.config_type()
        require_packages(names_of(self.args.report_to))
        self.processing_class: Any = next(
            (t for t in (processing_class, tokenizer, model.tokenizer) if t is not None), None
        )
        if self.processing_class is None and self.args.report_samples:
            raise OptionError(
                f"report_samples={self.args.report_samples}, and there is no tokenizer to read answers with.",
                expected="the model's tokenizer.",
                fix="Pass processing_class=tokenizer, or leave report_samples out.",
            )
        require_rows(self.processing_class, model.causal_lm.config.vocab_size)
        self.callbacks = require_callbacks(callbacks)
        self.state: RunState | None = None
        """Where the newest run is, or was when it ended."""
        self.keeper: Keeper | None = None
        """That of the newest run, if the trainer has any."""
        self._run: Run | None = None
        """The one that is under way."""
        self.log_history: list[Record] = []
        self.step: FittingStep | None = None
        """That of the newest run: `step.level` is what it computes again, and what it keeps where."""

    def _train(
        self,
        loss_at: Callable[[Remat], WatchedLoss],
        batches: Batches,
        total_steps: int,
        keeper: Keeper | None = None,
        draws_noise: bool = False,
    ) -> TrainOutput:
        """`keeper` evaluates and saves, where a trainer can."""
        optimizer, rate = optimizer_of(self.args, total_steps)
        step = self.step = self._step_of(loss_at, optimizer, rate, draws_noise)
        run = Run(
            self.args,
            self.model,
            Trained(self.model, optimizer),
            total_steps,
            callbacks=self.callbacks,
            processing_class=self.processing_class,
            headline=self.headline,
            keeper=keeper,
            shown=self._shown(self.args.report_samples) if self.args.report_samples else (),
        )
        self.state, self.log_history = run.state, run.state.log_history
        self._run, self.keeper = run, keeper
        self.model.last_run = None
        try:
            metrics = run.go(step, batches)
        finally:
            self._run = None
        self.model.last_run = LastRun(self.method, facts_for_card(run))
        return TrainOutput(run.tally.steps, metrics["train_loss"], metrics)

    def _step_of(
        self,
        loss_at: Callable[[Remat], WatchedLoss],
        optimizer: optax.GradientTransformation,
        rate: Schedule,
        draws_noise: bool,
    ) -> FittingStep:
        model, args = self.model, self.args
        config, trains_all = model.causal_lm.lora_config, model.lora is None
        draws = draws_noise or (config is not None and config.lora_dropout > 0)
        dropout_seed = args.seed if draws else None

        def loss_of(how: Remat) -> WatchedLoss:
            return of_all_weights(loss_at(how)) if trains_all else loss_at(how)

        def step_at(name: str) -> CompiledLater:
            return make_step(
                loss_of(remat(name)), optimizer, rate, args.max_grad_norm or None, dropout_seed, args.seed,
                compiler_options(remat(name)),
            )  # fmt: skip

        asked, option = args.gradient_checkpointing, "gradient_checkpointing"
        if asked is None:
            asked, option = model.gradient_checkpointing, "use_gradient_checkpointing"
        return FittingStep(step_at, loss_of, level(asked), option)

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """The model as it is now, as its own `save_pretrained` writes it, with the tokenizer; to output_dir by
        default."""
        folder = self.args.output_dir if output_dir is None else output_dir
        if folder is None:
            raise OptionError(
                "save_model() of a trainer without an output_dir.", expected="a folder.", fix="Pass one."
            )
        saves = hasattr(self.processing_class, "save_pretrained")
        self.model.save_pretrained(folder, self.processing_class if saves else None)

    def add_callback(self, callback: Any) -> None:
        self.callbacks += require_callbacks([callback])

    def pop_callback(self, callback: Any) -> Any:
        """Takes one away, or the first of a class, and returns it; None if there is none."""
        found = find_callback(self.callbacks, callback)
        if found is not None:
            self.callbacks.remove(found)
        return found

    def remove_callback(self, callback: Any) -> None:
        self.pop_callback(callback)

    def log(self, logs: Record) -> None:
        """Adds numbers to the log: to a run's own, with its trackers and callbacks, while one is under way."""
        if self._run is not None:
            self._run.say(logs)
        else:
            self.log_history.append(self._now() | logs)

    def _now(self) -> Record:
        return {} if self.state is None else {"step": self.state.global_step, "epoch": self.state.epoch}

    def log_metrics(self, split: str, metrics: Record) -> None:
        """Prints them, a line each."""
        for name, value in sorted(metrics.items()):
            log.info(
                "%s metrics: %s = %s", split, name, f"{value:.4f}" if isinstance(value, float) else value
            )

    def save_metrics(self, split: str, metrics: Record, combined: bool = True) -> None:
        """To <split>_results.json in output_dir; `combined` adds them to all_results.json too."""
        folder = self._folder("save_metrics()")
        _write_json(folder / f"{split}_results.json", metrics)
        if combined:
            path = folder / "all_results.json"
            before = json.loads(path.read_text()) if path.is_file() else {}
            _write_json(path, before | metrics)

    def save_state(self) -> None:
        """Where the newest run is, with its log, as trainer_state.json in output_dir. (A checkpoint has its own.)"""
        folder = self._folder("save_state()")
        if self.state is not None:
            _write_json(folder / "trainer_state.json", dataclasses.asdict(self.state))

    def is_world_process_zero(self) -> bool:
        return jax.process_index() == 0

    def plot(self) -> "Figure":
        """The curves of the log, as a figure that a notebook shows."""
        panels = curves.panels(self.log_history)
        if not panels:
            raise OptionError(
                "plot() of a trainer whose log is empty.", expected="a run.", fix="Call train() first."
            )
        return curves.figure(panels)

    def _shown(self, count: int) -> list[Shown]:
        """Prompts for the report, of a trainer that has any."""
        return []

    def _folder(self, what: str) -> Path:
        folder = self.args.output_dir
        if folder is None:
            raise OptionError(
                f"{what} of a trainer without an output_dir.", expected="a folder.", fix="Set output_dir."
            )
        return Path(folder)


def _write_json(path: Path, content: Any) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error


def optimizer_of(args: TrainingConfig, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer that the settings name, and its rate at every step."""
    warmup_steps = args.warmup(total_steps)
    rate = schedule(
        args.lr_scheduler_type, args.learning_rate, warmup_steps, total_steps, args.lr_scheduler_kwargs
    )
    own = args.embedding_learning_rate
    embedding = None if own is None else own / args.learning_rate
    optimizer = make_optimizer(
        args.optim,
        rate,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
        warmup_steps=warmup_steps,
        optim_args=args.optim_args,
        rates=own_rates(embedding, args.loraplus_lr_ratio),
    )
    if args.skip_nonfinite_steps:
        optimizer = skipping(optimizer)
    return (offloaded(optimizer) if args.offload_optimizer else optimizer), rate
