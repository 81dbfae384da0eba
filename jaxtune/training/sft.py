"""SFTTrainer: supervised fine-tuning of a model's adapter, under TRL's names."""

import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtune.data.batches import BatchStream
from jaxtune.data.formats import prepare
from jaxtune.data.sample import Sample
from jaxtune.errors import AdapterError, OptionError
from jaxtune.log import show
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.options import ANY, mirrors
from jaxtune.training.config import SFTConfig
from jaxtune.training.loop import Record, run
from jaxtune.training.losses import next_token_loss
from jaxtune.training.metrics import RunLog
from jaxtune.training.optimizers import adamw, schedule
from jaxtune.training.remat import level, remat
from jaxtune.training.step import TrainState, init_state, make_step


class Trainable(Protocol):
    """What the trainer needs of a model; `jaxtune.LanguageModel` is one."""

    causal_lm: CausalLM
    params: Params
    lora: Lora | None
    tokenizer: Any
    max_seq_length: int
    gradient_checkpointing: bool | str


WITHOUT_EFFECT = {
    "eval_dataset": None,
    "data_collator": None,
    "peft_config": None,
    "callbacks": (None, []),
    "packing": False,
    "dataset_num_proc": ANY,
}


class TrainOutput(NamedTuple):
    """As transformers has it."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


@mirrors(WITHOUT_EFFECT)
class SFTTrainer:
    """Tokenises the dataset when it is made; `train()` runs it and leaves the trained adapter in `model.lora`.

    `samples` is what will be trained on, and may be changed before `train()` (`train_on_responses_only` does);
    `log_history` is every logged step's numbers."""

    def __init__(
        self,
        model: Trainable,
        args: SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        formatting_func: Callable | None = None,
    ):
        show()
        if not isinstance(args, SFTConfig | None):
            raise OptionError(
                f"SFTTrainer's args is a {type(args).__name__}.",
                expected="an SFTConfig.",
                fix="Pass args=SFTConfig(...).",
            )
        if model.lora is None:
            raise AdapterError(
                "The model has no adapter to train.",
                expected="a model that went through FastLanguageModel.get_peft_model.",
                fix="Call FastLanguageModel.get_peft_model(model) first.",
            )
        if train_dataset is None:
            raise OptionError(
                "SFTTrainer was given no train_dataset.", expected="a dataset.", fix="Pass train_dataset=..."
            )
        self.model, self.args = model, args or SFTConfig()
        self.processing_class = next(
            (t for t in (processing_class, tokenizer, model.tokenizer) if t is not None), None
        )
        self.samples: list[Sample] = prepare(
            train_dataset,
            self.processing_class,
            text_field=self.args.dataset_text_field,
            formatting_func=formatting_func,
            max_length=self.args.max_length or model.max_seq_length,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
            vocab_size=model.causal_lm.config.vocab_size,
        )
        self.eval_samples = None
        self.log_history: list[Record] = []

    def train(self) -> TrainOutput:
        args, stream = self.args, self.batches()
        total = args.total_steps(stream.steps_per_epoch)
        rate = schedule(args.lr_scheduler_type, args.learning_rate, args.warmup(total), total)
        optimizer = adamw(
            rate,
            beta1=args.adam_beta1,
            beta2=args.adam_beta2,
            epsilon=args.adam_epsilon,
            weight_decay=args.weight_decay,
        )
        checkpointing = self.model.gradient_checkpointing
        checkpointing = checkpointing if args.gradient_checkpointing is None else args.gradient_checkpointing
        loss = next_token_loss(self.model.causal_lm, remat(level(checkpointing)))
        step = make_step(loss, optimizer, rate, args.max_grad_norm or None)
        assert self.model.lora is not None
        state = init_state(self.model.lora, optimizer)

        self.log_history = []
        records: list[Record] = []
        unlogged: list[float] = []
        started = time.perf_counter()
        with RunLog(args, total) as output:

            def on_record(record: Record) -> None:
                records.append(record)
                unlogged.append(record["loss"])
                if len(records) % args.logging_steps == 0 or len(records) == total:
                    record = {**record, "loss": sum(unlogged) / len(unlogged)}
                    unlogged.clear()
                    self.log_history.append(record)
                    output.write(record)
                output.advance()

            batches = (
                (
                    batch,
                    {
                        "epoch": info.epoch,
                        "samples": info.num_samples,
                        "packing_efficiency": info.efficiency,
                    },
                )
                for batch, info in itertools.islice(stream, total)
            )
            latest = state

            def on_state(state: TrainState) -> None:
                nonlocal latest
                latest = state

            try:
                latest = run(step, state, self.model.params, batches, on_record, on_state)
            except KeyboardInterrupt:
                self.model.lora = latest.lora  # what was learnt so far is not lost
                raise
        self.model.lora = latest.lora
        runtime = time.perf_counter() - started
        mean = sum(record["loss"] for record in records) / total
        metrics = {
            "train_runtime": runtime,
            "train_samples_per_second": sum(record["samples"] for record in records) / runtime,
            "train_steps_per_second": total / runtime,
            "train_loss": mean,
            "epoch": total / stream.steps_per_epoch,
        }
        return TrainOutput(total, mean, metrics)

    def batches(self) -> BatchStream:
        """The batches of a run, from its beginning: deterministic in the seed."""
        return BatchStream(
            self.samples,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )
