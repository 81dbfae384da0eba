"""SFTTrainer: supervised fine-tuning of a model's adapter, or of all its weights, under TRL's names."""

from collections.abc import Callable
from typing import Any

from jaxtune.data.batches import BatchStream, StepInfo
from jaxtune.data.formats import prepare
from jaxtune.data.sample import Sample
from jaxtune.models.layer_loop import Remat
from jaxtune.options import ANY, mirrors
from jaxtune.training.losses import WatchedLoss, next_token_loss, unwatched
from jaxtune.training.sft_config import SFTConfig
from jaxtune.training.trainer import Trainable, Trainer, TrainOutput

_WITHOUT_EFFECT = {
    "eval_dataset": None,
    "data_collator": None,
    "peft_config": None,
    "callbacks": (None, []),
    "packing": False,
    "dataset_num_proc": ANY,
}


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
        processing_class: Any = None,
        tokenizer: Any = None,
        formatting_func: Callable | None = None,
    ):
        super().__init__(
            model, args, train_dataset=train_dataset, processing_class=processing_class, tokenizer=tokenizer
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

    def train(self) -> TrainOutput:
        stream = self.batches()
        with_facts = ((batch, _facts(info)) for batch, info in stream)
        steps = self.args.total_steps(stream.steps_per_epoch)
        noisy = bool(self.args.neftune_noise_alpha)
        return self._train(self._loss_at, lambda newest: with_facts, steps, draws_noise=noisy)

    def _loss_at(self, remat: Remat) -> WatchedLoss:
        args = self.args
        loss = next_token_loss(
            self.model.causal_lm,
            remat,
            loss_type=args.loss_type,
            label_smoothing=args.label_smoothing_factor,
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


def _facts(info: StepInfo) -> dict[str, float]:
    return {"epoch": info.epoch, "samples": info.num_samples, "packing_efficiency": info.efficiency}
