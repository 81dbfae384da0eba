"""Names that Unsloth's scripts import and that are something else here, or nothing."""

from typing import Any

from jaxtune.kernels.gpu import capability
from jaxtune.training import SFTConfig, SFTTrainer

UnslothTrainer = SFTTrainer
UnslothTrainingArguments = SFTConfig


def is_bfloat16_supported() -> bool:
    """Whether bfloat16 is computed with here; GPUs before Ampere do not."""
    return not 0 < capability() < 8.0


def unsloth_train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """trainer.train(): here that divides by the tokens of the whole step, accumulated or not."""
    return trainer.train(*args, **kwargs)
