"""One loop, and supervised fine-tuning on it."""

from jaxtune.training.config import SFTConfig
from jaxtune.training.sft import SFTTrainer

__all__ = ["SFTConfig", "SFTTrainer"]
