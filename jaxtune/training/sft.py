"""SFTTrainer: supervised fine-tuning of a model's adapter, or of all its weights, under TRL's names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtune.data.batches import Batch, BatchStream, StepInfo
from jaxtune.data.formats import prepare
from jaxtune.data.preview import preview
from jaxtune.data.sample import Sample
from jaxtune.data.token_cache import default_folder
from jaxtune.errors import OptionError
from jaxtune.log import get_logger, show
from jaxtune.models.flops import useful_flops
from jaxtune.models.layer_loop import Remat
from jaxtune.options import ANY, mirrors
from jaxtune.training.evaluation import evaluate_all
from jaxtune.training.keeper import Keeper
from jaxtune.training.loop import Record
from jaxtune.training.losses import WatchedLoss, next_token_loss, unwatched
from jaxtune.training.run_report import Shown, shown
from jaxtune.training.sft_config import SFTConfig
from jaxtune.training.speed import sample_lengths
from jaxtune.training.trained import Trainable
from jaxtune.training.trainer import Trainer, TrainOutput

log = get_logger(__name__)

_WITHOUT_EFFECT = {
    "peft_config": None,
    "packing": False,
    "dataset_num_proc": ANY,
}


_PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq", "DataCollatorWithPadding", "DataCollatorForLanguageModeling", "default_data_collator",
)  # fmt: skip


@mirrors(_WITHOUT_EFFECT)
class SFTTrainer(Trainer):
    """Tokenises the dataset when it is made; `train()` runs it and leaves the trained adapter in `model.lora`, or with
    full fine-tuning the trained weights in `model.params`.

    `samples` is what will be trained on, and may be changed before `train()` (`train_on_responses_only` does);
    `log_history` is every logged step's numbers."""

    config_type = SFTConfig
    args: SFTConfig

    def __init__(
        self,
        model: Trainable,
        args: SFTConfig | None = None,
        *,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
        formatting_func: Callable | None = None,
        data_collator: Any = None,
        callbacks: Any = None,
        dataset_text_field: str | None = None,
        max_seq_length: int | None = None,
    ):
        """The last two are SFTConfig's, which older scripts give here."""
        _require_padding_only(data_collator)
        older = {"dataset_text_field": dataset_text_field, "max_length": max_seq_length}
        given: dict[str, Any] = {name: value for name, value in older.items() if value is not None}
        if given:
            args = dataclasses.replace(args or SFTConfig(), **given)
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        self._prepare = functools.partial(
            prepare,
            tokenizer=self.processing_class,
            text_field=self.args.dataset_text_field,
            formatting_func=formatting_func,
            max_length=self.args.max_length or model.max_seq_length,
            completion_only_loss=self.args.completion_only_loss,
            assistant_only_loss=self.args.assistant_only_loss,
            vocab_size=model.causal_lm.config.vocab_size,
            cache=default_folder() if self.args.cache_tokens else None,
        )
        self.samples: list[Sample] = self._prepare(train_dataset)
        self.eval_samples: list[Sample] | dict[str, list[Sample]] | None = self._prepare_eval(eval_dataset)
        if self.eval_samples is None and self.args.eval_strategy != "no":
            raise OptionError(
                f"eval_strategy={self.args.eval_strategy!r}, and there is no eval_dataset.",
                expected="a dataset to evaluate on.",
                fix="Pass eval_dataset=..., or leave eval_strategy out.",
            )

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainOutput:
        """Trains from the beginning, or from a checkpoint: a folder, or True for the newest in output_dir."""
        stream = self.batches()
        with_facts = ((batch, _facts(info) | self._useful_flops(batch)) for batch, info in stream)
        keeper = Keeper(
            self.args,
            self.model,
            self.processing_class,
            stream,
            _by_prefix(self.eval_samples, "eval"),
            resume_from_checkpoint,
        )
        total_steps = self.args.total_steps(stream.steps_per_epoch)
        noisy = bool(self.args.neftune_noise_alpha)
        return self._train(self._loss_at, lambda newest: with_facts, total_steps, keeper, draws_noise=noisy)

    def _useful_flops(self, batch: Batch) -> dict[str, float]:
        lengths, model = sample_lengths(batch["segment_ids"]), self.model
        return {"useful_flops": useful_flops(model.causal_lm.config, lengths, full=model.full_finetuning)}

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> Record:
        """The loss of a dataset, by default of the trainer's own, with the model as it is now."""
        samples = self.eval_samples if eval_dataset is None else self._prepare_eval(eval_dataset)
        if samples is None:
            raise OptionError(
                "evaluate() of a trainer without an eval_dataset.",
                expected="a dataset.",
                fix="Pass one: trainer.evaluate(dataset).",
            )
        sets, batch_size = _by_prefix(samples, metric_key_prefix), self.args.per_device_eval_batch_size
        return evaluate_all(self.model.causal_lm, self.model.params, self.model.lora, sets, batch_size)

    def _prepare_eval(self, dataset: Any) -> list[Sample] | dict[str, list[Sample]] | None:
        if isinstance(dataset, Mapping):
            return {name: self._prepare(each) for name, each in dataset.items()}
        return None if dataset is None else self._prepare(dataset)

    def _shown(self, count: int) -> list[Shown]:
        """Of the first dataset that is evaluated, or else of what is trained on."""
        samples = next(iter(_by_prefix(self.eval_samples, "eval").values()), self.samples)
        return [shown(sample) for sample in samples[:count]]

    def preview(self, index: int = 0) -> None:
        """Prints a sample as it will be trained on: its tokens, and which of them the loss counts."""
        if not -len(self.samples) <= index < len(self.samples):
            raise OptionError(
                f"there is no sample {index}.",
                expected=f"an index below {len(self.samples)}, the number of samples.",
                fix="Pass a smaller one.",
            )
        print(preview(self.samples[index], self.processing_class))

    def _loss_at(self, remat: Remat) -> WatchedLoss:
        args = self.args
        loss = next_token_loss(
            self.model.causal_lm,
            remat,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing_factor,
            z_loss=args.z_loss_weight,
            neftune_noise_alpha=args.neftune_noise_alpha,
        )
        return unwatched(loss)

    def batches(self) -> BatchStream:
        """The batches of a run, from its beginning: deterministic in the seed."""
        return BatchStream(
            self.samples,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
        )


def _require_padding_only(collator: Any) -> None:
    """transformers' collators that only pad have nothing to do here, where samples lie end to end; others would."""
    name = getattr(collator, "__name__", type(collator).__name__)
    pads = name in _PADDING_COLLATORS and not getattr(collator, "mlm", False)
    if collator is None:
        return
    if not pads:
        raise OptionError(
            f"SFTTrainer was given data_collator={name}, which this version does not support.",
            expected=f"None, or one of {', '.join(_PADDING_COLLATORS)}, which pad.",
            fix="Leave it out. What it masks, assistant_only_loss, completion_only_loss or train_on_responses_only do.",
        )
    show()
    log.info("SFTTrainer: data_collator=%s has no effect in jaxtune: samples lie end to end.", name)


def _by_prefix(samples: Any, prefix: str) -> dict[str, list[Sample]]:
    """What metrics of each dataset begin with, as transformers has it."""
    if samples is None:
        return {}
    return (
        {f"{prefix}_{name}": each for name, each in samples.items()}
        if isinstance(samples, dict)
        else {prefix: samples}
    )


def _facts(info: StepInfo) -> dict[str, Any]:
    return {
        "epoch": info.epoch,
        "samples": info.num_samples,
        "packing_efficiency": info.efficiency,
        "sample_ids": info.sample_ids,
    }
