"""What every trainer does: check what it is given, run the loop over its batches, keep the log, leave in the model what
was trained: its adapter, or with full fine-tuning its weights.

A trainer of its own kind adds what its batches are and what its loss is.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import optax

from jaxtune.errors import AdapterError, DivergenceError, OptionError
from jaxtune.loading.tokenizer import require_rows
from jaxtune.log import show
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.models.layer_loop import Remat
from jaxtune.training.callbacks import Callbacks, RunState, require_callbacks
from jaxtune.training.config import TrainingConfig
from jaxtune.training.fitting import FittingStep
from jaxtune.training.keeper import Keeper
from jaxtune.training.loop import Record, run
from jaxtune.training.losses import WatchedLoss, of_all_weights
from jaxtune.training.metrics import RunLog, Tally
from jaxtune.training.optimizers import averaged, make_optimizer, offloaded, own_rates, skipping
from jaxtune.training.remat import compiler_options, level, remat
from jaxtune.training.schedules import Schedule, schedule
from jaxtune.training.step import CompiledLater, TrainState, init_state, make_step
from jaxtune.training.termination import TERMINATED, terminable


class Trainable(Protocol):
    """What a trainer needs of a model; `jaxtune.LanguageModel` is one."""

    causal_lm: CausalLM
    params: Params
    lora: Lora | None
    full_finetuning: bool
    tokenizer: Any
    max_seq_length: int
    gradient_checkpointing: bool | str
    stop_ids: tuple[int, ...]

    def save_pretrained(self, save_directory: str | Path, tokenizer: Any = None) -> None: ...


class TrainOutput(NamedTuple):
    """As transformers has it."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


Newest = Callable[[], tuple[Params, Lora | None]]
"""The model's weights and its adapter as they are now, while either is being trained."""

Batches = Callable[[Newest], Iterator[tuple[Mapping[str, Any], Mapping[str, float]]]]
"""Endless batches [A, R, L], each with facts for the log: `epoch` and `samples` among them."""


class Trainer:
    """`log_history` is every logged step's numbers."""

    config_type: ClassVar[type[TrainingConfig]]
    args: TrainingConfig
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Of a step's numbers, those that the progress bar shows."""

    def __init__(
        self,
        model: Trainable,
        args: TrainingConfig | None,
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
        self.processing_class: Any = next(
            (t for t in (processing_class, tokenizer, model.tokenizer) if t is not None), None
        )
        require_rows(self.processing_class, model.causal_lm.config.vocab_size)
        self.callbacks = require_callbacks(callbacks)
        self.state: RunState | None = None
        """Where the newest run is, or was when it ended."""
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
        model, args = self.model, self.args
        optimizer, rate = optimizer_of(args, total_steps)
        config = model.causal_lm.lora_config
        draws = draws_noise or (config is not None and config.lora_dropout > 0)
        dropout_seed = args.seed if draws else None
        trains_all = model.lora is None
        trained, frozen = (model.params, {}) if model.lora is None else (model.lora, model.params)

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
        step = self.step = FittingStep(step_at, loss_of, level(asked), option)
        # There is one copy of the weights: while they are trained, the model's are the newest.
        state = init_state(trained, optimizer, consume=trains_all)
        if not trains_all:  # nor is there a second adapter, unless someone else holds it
            model.lora = jax.device_get(model.lora)
        del trained
        run_state = self.state = RunState(total_steps, args.num_train_epochs)
        tally = Tally()

        def newest() -> tuple[Params, Lora | None]:
            return (model.params, None) if trains_all else (model.params, state.trained)

        def hand_over(newest_state: TrainState) -> None:
            nonlocal state  # the one before is consumed
            state = newest_state
            if trains_all:
                model.params = newest_state.trained

        def left() -> tuple[Params, Lora | None]:
            """What the run would leave if it ended now."""
            final = averaged(state.trained, state.optimizer)
            return (final, None) if trains_all else (model.params, final)

        def keep() -> None:
            model.params, model.lora = left()

        if keeper is not None:
            hand_over(keeper.begin(run_state, tally, state))
        self.log_history = run_state.log_history
        callbacks = Callbacks(
            self.callbacks, args, run_state, model=model, processing_class=self.processing_class
        )
        started, begun_at = time.perf_counter(), run_state.global_step
        with (
            RunLog(args, total_steps, self.headline, run_state.log_history, begun_at) as output,
            terminable() as end,
        ):

            def write_log() -> None:
                record = tally.average()
                run_state.log_history.append(record)
                output.write(record)
                callbacks.call("on_log", logs=record)

            def on_record(record: Record) -> None:
                tally.add(record)
                if tally.steps % args.logging_steps == 0 or tally.steps == total_steps:
                    write_log()
                output.advance()

            def after_step(facts: Mapping[str, Any], settle: Callable[[], None]) -> bool:
                run_state.global_step += 1
                run_state.epoch = facts["epoch"]
                epoch_ends = float(facts["epoch"]).is_integer()
                callbacks.call("on_step_end")
                if epoch_ends:
                    callbacks.call("on_epoch_end")
                if keeper is not None:
                    keeper.after_step(state, left, output, callbacks, settle, epoch_ends, bool(end))
                goes_on = not (callbacks.control.should_training_stop or end)
                if goes_on and run_state.global_step < total_steps:
                    if epoch_ends:
                        callbacks.call("on_epoch_begin")
                    callbacks.call("on_step_begin")
                return goes_on

            for hook in ("on_train_begin", "on_epoch_begin", "on_step_begin"):
                callbacks.call(hook)
            if keeper is not None:
                keeper.before_training(left, output, callbacks)
            stream = itertools.islice(batches(newest), total_steps - begun_at)
            try:
                run(step, state, frozen, stream, on_record, hand_over, after_step, args.skip_nonfinite_steps)
                if tally.unlogged:  # stopped between two lines
                    write_log()
                if keeper is not None:
                    hand_over(keeper.end(state))
            except DivergenceError as error:
                if keeper is not None:
                    keeper.abandon()
                raise self._diverged(error, keeper, trains_all) from error
            except BaseException:  # an interrupt, a reward function, a full disk: what was learnt is not lost
                if keeper is not None:
                    keeper.abandon()
                if not any(map(_is_gone, jax.tree.leaves(state.trained))):
                    keep()
                raise
        keep()
        callbacks.call("on_train_end")
        if end:
            raise SystemExit(TERMINATED)
        runtime, steps = time.perf_counter() - started, tally.steps
        metrics = {
            "train_runtime": runtime,
            "train_samples_per_second": tally.samples / runtime,
            "train_steps_per_second": (steps - begun_at) / runtime,
            "train_loss": tally.mean_loss,
            "epoch": run_state.epoch,
        }
        return TrainOutput(steps, metrics["train_loss"], metrics)

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

    def _diverged(self, error: DivergenceError, keeper: Keeper | None, trains_all: bool) -> DivergenceError:
        """The same, with what there is to go on from."""
        fix = error.fix
        last = None if keeper is None else keeper.last_checkpoint
        if last is not None:
            fix += f" The last checkpoint before it is {last}: resume_from_checkpoint takes it."
        elif trains_all:
            fix += " First load the model again: the weights that it began with are gone."
        return DivergenceError(error.found, expected=error.expected, fix=fix)


def _is_gone(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


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
