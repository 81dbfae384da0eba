"""One loop, and supervised fine-tuning on it."""

from jaxtune.training.callbacks import EarlyStoppingCallback, TrainerCallback
from jaxtune.training.sft import SFTTrainer
from jaxtune.training.sft_config import SFTConfig

__all__ = ["EarlyStoppingCallback", "SFTConfig", "SFTTrainer", "TrainerCallback"]
