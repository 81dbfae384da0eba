"""SFTTrainer: supervised fine-tuning of a model's adapter, or of all its weights, under TRL's names."""

from collections.abc import Callable
from typing import Any

from jaxtune.data.batches import BatchStream, StepInfo
from jaxtune.data.formats import prepare
from jaxtune.data.preview import preview
from jaxtune.data.sample import Sample
from jaxtune.data.token_cache import default_folder
from jaxtune.errors import OptionError
from jaxtune.options import ANY, mirrors
from jaxtune.training.losses import next_token_loss, unwatched
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
            cache=default_folder() if self.args.cache_tokens else None,
        )
        self.eval_samples = None

    def train(self) -> TrainOutput:
        stream = self.batches()
        with_facts = ((batch, _facts(info)) for batch, info in stream)
        loss_at = lambda remat: unwatched(next_token_loss(self.model.causal_lm, remat))
        return self._train(loss_at, lambda newest: with_facts, self.args.total_steps(stream.steps_per_epoch))

    def preview(self, index: int = 0) -> None:
        """Prints a sample as it will be trained on: its tokens, and which of them the loss counts."""
        if not -len(self.samples) <= index < len(self.samples):
            raise OptionError(
                f"there is no sample {index}.",
                expected=f"an index below {len(self.samples)}, the number of samples.",
                fix="Pass a smaller one.",
            )
        print(preview(self.samples[index], self.processing_class))

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
