"""Reinforcement learning on the training loop: GRPO."""

from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.grpo import GRPOTrainer

__all__ = ["GRPOConfig", "GRPOTrainer"]
