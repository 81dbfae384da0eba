"""SFTTrainer: supervised fine-tuning of a model's adapter, or of all its weights, under TRL's names."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtune.data.batches import Batch, BatchStream, StepInfo, epoch_order
from jaxtune.data.formats import prepare
from jaxtune.data.packing import pack
from jaxtune.data.parts import response_marker
from jaxtune.data.preview import preview
from jaxtune.data.sample import Item, Sample
from jaxtune.data.sample_rows import SampleRows
from jaxtune.data.token_cache import default_folder
from jaxtune.errors import OptionError, within
from jaxtune.log import counted, get_logger, show
from jaxtune.models.flops import useful_flops
from jaxtune.models.layer_loop import Remat
from jaxtune.options import ANY, mirrors
from jaxtune.training.evaluation import evaluate_all
from jaxtune.training.keeper import EvalSets, Keeper
from jaxtune.training.loop import Record
from jaxtune.training.losses import WatchedLoss, next_token_loss, unwatched
from jaxtune.training.run_report import Shown, shown
from jaxtune.training.sft_config import SFTConfig
from jaxtune.training.speed import sample_lengths
from jaxtune.training.tokenizer_options import change_tokenizer
from jaxtune.training.trained import Trainable
from jaxtune.training.trainer import Trainer, TrainOutput

log = get_logger(__name__)

_WITHOUT_EFFECT = {
    "peft_config": None,
    "quantization_config": None,
    "compute_loss_func": None,
    "compute_metrics": None,
    "preprocess_logits_for_metrics": None,
    "model_init": None,
    "optimizers": ((None, None), None),
    "optimizer_cls_and_kwargs": None,
    "dataset_num_proc": ANY,
}

_PADDING_COLLATORS = (
    "DataCollatorForSeq2Seq", "DataCollatorWithPadding", "DataCollatorForLanguageModeling", "default_data_collator",
)  # fmt: skip


BEFORE_ALL = 2**63
"""The number of the epoch whose order shuffle_dataset takes."""


@mirrors(_WITHOUT_EFFECT)
class SFTTrainer(Trainer):
    """Tokenises the dataset when it is made; `train()` runs it and leaves the trained adapter in `model.lora`, or with
    full fine-tuning the trained weights in `model.params`.

    `samples` is what will be trained on, and may be changed before `train()` (`train_on_responses_only` does), which
    packs them if that is asked for. `log_history` is every logged step's numbers."""

    config_type = SFTConfig
    method = "sft"
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
        packing: bool | None = None,
        dataset_kwargs: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: What is trained: its adapter, or with full fine-tuning its weights.
            args: The settings; None takes their defaults.
            train_dataset: Rows, a `datasets.Dataset`, or files (see `jaxtune.data.formats.prepare`).
            eval_dataset: The same to evaluate on, or a dict of several by their names.
            processing_class: The tokenizer; None takes the model's.
            tokenizer: The same by its older name.
            formatting_func: Makes the text (or several) of a row.
            data_collator: None, or one of transformers' that only pad.
            callbacks: TrainerCallbacks.
            dataset_text_field: SFTConfig's, which older scripts give here.
            max_seq_length: SFTConfig's max_length, likewise.
            packing: SFTConfig's, likewise.
            dataset_kwargs: SFTConfig's, likewise.
        """
        _require_padding_only(data_collator)
        older = {
            "dataset_text_field": dataset_text_field,
            "max_length": max_seq_length,
            "packing": packing,
            "dataset_kwargs": dataset_kwargs,
        }
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
        args = self.args
        change_tokenizer(self.processing_class, args.eos_token, args.pad_token, args.chat_template_path)
        self._max_length = _capped(args.max_length or model.max_seq_length, model.max_seq_length)
        self._read = functools.partial(
            prepare,
            tokenizer=self.processing_class,
            text_field=args.dataset_text_field,
            formatting_func=formatting_func,
            truncation_mode=args.truncation_mode,
            completion_only_loss=args.completion_only_loss,
            assistant_only_loss=args.assistant_only_loss,
            add_special_tokens=(args.dataset_kwargs or {}).get("add_special_tokens", True),
            vocab_size=model.causal_lm.config.vocab_size,
            cache=default_folder() if args.cache_tokens else None,
        )
        self.masks: list[Callable[[Sequence[Sample]], list[Sample]]] = []
        """What `train_on_responses_only` did to the samples, for datasets that are given to `evaluate` later."""
        self.samples: list[Sample] = self._prepare(train_dataset, args.packing, "train_dataset")
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
            self._eval_sets(self.eval_samples, "eval"),
            resume_from_checkpoint,
        )
        total_steps = self.args.total_steps(stream.steps_per_epoch)
        noisy = bool(self.args.neftune_noise_alpha)
        return self._train(self._loss_at, lambda newest: with_facts, total_steps, keeper, draws_noise=noisy)

    def _useful_flops(self, batch: Batch) -> dict[str, float]:
        lengths, model = sample_lengths(batch["segment_ids"]), self.model
        return {"useful_flops": useful_flops(model.causal_lm.config, lengths, full=model.full_finetuning)}

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "eval") -> Record:
        """The loss of a dataset, by default of the trainer's own, with the model as it is now. What
        `train_on_responses_only` took out of the trainer's own samples does not count in others either."""
        samples = self.eval_samples if eval_dataset is None else self._prepare_eval(eval_dataset)
        if samples is None:
            raise OptionError(
                "evaluate() of a trainer without an eval_dataset.",
                expected="a dataset.",
                fix="Pass one: trainer.evaluate(dataset).",
            )
        sets = self._eval_sets(samples, metric_key_prefix)
        batch_size = self.args.per_device_eval_batch_size
        return evaluate_all(self.model.causal_lm, self.model.params, self.model.lora, sets, batch_size)

    @property
    def train_dataset(self) -> SampleRows:
        """What will be trained on, as rows of `input_ids` and `labels`; not packed."""
        return SampleRows(self.samples)

    @property
    def eval_dataset(self) -> SampleRows | dict[str, SampleRows] | None:
        samples = self.eval_samples
        if isinstance(samples, dict):
            return {name: SampleRows(each) for name, each in samples.items()}
        return None if samples is None else SampleRows(samples)

    def _prepare(self, dataset: Any, packs: bool, name: str) -> list[Sample]:
        cuts = self.args.cuts_before_packing(packs)
        with within(name):
            samples = self._read(dataset, max_length=self._max_length if cuts else None)
        if self.args.shuffle_dataset:
            samples = [samples[n] for n in epoch_order(len(samples), self.args.seed, BEFORE_ALL).tolist()]
        for mask in self.masks:
            samples = mask(samples)
        return samples

    def _prepare_eval(self, dataset: Any) -> list[Sample] | dict[str, list[Sample]] | None:
        packs = self.args.packs_evaluations
        if isinstance(dataset, Mapping):
            return {
                name: self._prepare(each, packs, f"eval_dataset[{name!r}]") for name, each in dataset.items()
            }
        return None if dataset is None else self._prepare(dataset, packs, "eval_dataset")

    def _items(self, samples: Sequence[Sample], packs: bool) -> Sequence[Item]:
        """What the size of a batch counts: samples, or the rows that they are packed in."""
        if not packs:
            return samples
        rows = pack(samples, self._max_length, self.args.packing_strategy)
        found = counted(len(samples), "sample"), counted(len(rows), "packed row")
        log.info("%s in %s of at most %d tokens", *found, self._max_length)
        return rows

    def _eval_sets(self, samples: Any, prefix: str) -> EvalSets:
        """By what the metrics of each dataset begin with, as transformers has it."""
        if samples is None:
            return {}
        named = (
            {f"{prefix}_{name}": each for name, each in samples.items()} if isinstance(samples, dict) else {}
        )
        packs = self.args.packs_evaluations
        return {name: self._items(each, packs) for name, each in (named or {prefix: samples}).items()}

    def _shown(self, count: int) -> list[Shown]:
        """Of the first dataset that is evaluated, or else of what is trained on."""
        evaluated = self.eval_samples
        samples = next(iter(evaluated.values()), None) if isinstance(evaluated, dict) else evaluated
        samples = self.samples if samples is None else samples
        response = response_marker(self.processing_class)
        return [shown(sample, response) for sample in samples[:count]]

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
        args = self.args
        return BatchStream(
            self._items(self.samples, args.packing),
            batch_size=args.per_device_train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            seed=args.order_seed,
            shuffle=args.train_sampling_strategy != "sequential",
            drop_last=args.dataloader_drop_last,
        )


def _capped(max_length: int, max_seq_length: int) -> int:
    """Beyond max_seq_length the model was not set up: its rotary embedding is stretched as far as that, not further."""
    if max_length > max_seq_length:
        log.warning(
            "max_length=%d is more than the %d of the model's max_seq_length, which is taken instead. For longer "
            "samples, load the model with a larger one.", max_length, max_seq_length,
        )  # fmt: skip
    return min(max_length, max_seq_length)


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


def _facts(info: StepInfo) -> dict[str, Any]:
    return {
        "epoch": info.epoch,
        "samples": info.num_samples,
        "packing_efficiency": info.efficiency,
        "sample_ids": info.sample_ids,
    }
