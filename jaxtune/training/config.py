"""SFTConfig: the settings of a supervised run, under TRL's names and, where the two differ, Unsloth's defaults."""

import dataclasses
import math
from pathlib import Path

from jaxtune.errors import OptionError, nearest
from jaxtune.options import ANY, mirrors
from jaxtune.training.optimizers import SCHEDULES
from jaxtune.training.remat import level

WITHOUT_EFFECT = {
    "bf16": ANY,
    "fp16": ANY,
    "dataset_num_proc": ANY,
    "dataloader_num_workers": ANY,
    "dataloader_pin_memory": ANY,
    "remove_unused_columns": ANY,
    "padding_free": ANY,
    "report_to": ("none", [], None),
    "optim": ("adamw_torch", "adamw_torch_fused", "adamw"),
    "packing": False,
    "eval_strategy": "no",
    "save_strategy": "no",
    "push_to_hub": False,
    "group_by_length": False,
    "neftune_noise_alpha": None,
    "gradient_checkpointing_kwargs": ANY,
    "use_liger_kernel": ANY,
    "disable_tqdm": ANY,
    "run_name": ANY,
    "logging_first_step": ANY,
    "logging_strategy": "steps",
    "loss_type": ("nll", None),
}
"""Names that a TRL or Unsloth script may pass although they mean nothing here, or only with the value given."""


@mirrors(WITHOUT_EFFECT, aliases={"max_seq_length": "max_length"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig:
    output_dir: str | Path | None = None
    """Where metrics.jsonl goes; None writes nothing."""
    per_device_train_batch_size: int = 4
    """Samples in a micro-batch."""
    gradient_accumulation_steps: int = 2
    """Micro-batches in an optimizer step."""
    num_train_epochs: float = 3.0
    """Passes over the dataset, unless max_steps says otherwise."""
    max_steps: int = -1
    """Optimizer steps in all; -1 leaves it to num_train_epochs."""
    learning_rate: float = 5e-5
    """The highest rate of the schedule."""
    lr_scheduler_type: str = "linear"
    """constant, constant_with_warmup, cosine or linear."""
    warmup_steps: float | None = None
    """Steps over which the rate rises from 0; below 1, a part of all steps. None leaves it to warmup_ratio."""
    warmup_ratio: float = 0.1
    """The part of all steps over which it rises, rounded up."""
    weight_decay: float = 0.001
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean gradient."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean squared gradient."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to its denominator."""
    max_grad_norm: float | None = 1.0
    """Gradients are shrunk to this global norm; None or 0 leaves them alone."""
    max_length: int | None = None
    """Tokens that a sample may have before it is cut; None takes the model's max_seq_length."""
    dataset_text_field: str = "text"
    """The column of plain text."""
    completion_only_loss: bool | None = None
    """Train on completions alone; None does so for prompt/completion data."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns alone, as the chat template marks them."""
    gradient_checkpointing: bool | str | None = None
    """True, False, "unsloth" or a level of training.remat; None takes what the model was loaded with."""
    logging_steps: int = 1
    """Steps between two lines of the log."""
    seed: int = 3407
    """Of the order of the samples."""

    def __post_init__(self):
        at_least = {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "logging_steps": 1,
            "learning_rate": 0,
            "warmup_steps": 0,
            "weight_decay": 0,
            "adam_epsilon": 0,
            "max_grad_norm": 0,
            "max_length": 1,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is None and _may_be_none(name):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise _bad(name, value, f"a number of at least {least}")
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "max_steps",
        ):
            if not isinstance(getattr(self, name), int):
                raise _bad(name, getattr(self, name), "a whole number")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "a number from 0 to below 1")
        if not 0 <= self.warmup_ratio <= 1:
            raise _bad("warmup_ratio", self.warmup_ratio, "a part of all steps, from 0 to 1")
        if self.max_steps != -1 and self.max_steps < 1:
            raise _bad("max_steps", self.max_steps, "a number of steps, or -1 to count epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise _bad("num_train_epochs", self.num_train_epochs, "more than 0")
        if self.lr_scheduler_type not in SCHEDULES:
            near = nearest(str(self.lr_scheduler_type), SCHEDULES)
            raise _bad("lr_scheduler_type", self.lr_scheduler_type, f"one of {', '.join(SCHEDULES)}", near)
        if self.gradient_checkpointing is not None:
            level(self.gradient_checkpointing)

    def total_steps(self, steps_per_epoch: int) -> int:
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def warmup(self, total_steps: int) -> int:
        steps = self.warmup_ratio if self.warmup_steps is None else self.warmup_steps
        is_part = self.warmup_steps is None or steps < 1
        return math.ceil(steps * total_steps) if is_part else int(steps)


def _may_be_none(name: str) -> bool:
    return name in ("max_grad_norm", "max_length", "warmup_steps")


def _bad(name: str, value: object, expected: str, near: str = "") -> OptionError:
    return OptionError(f"SFTConfig: {name}={value!r}.", expected=expected + ".", fix=f"Correct {name}.{near}")
