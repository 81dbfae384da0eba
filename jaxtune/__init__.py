"""jaxtune: fine-tune language models in JAX.

A façade: names only. Each is imported from where it lives when it is first used, so `import jaxtune` costs
milliseconds and loads neither jax nor transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jaxtune.version import __version__

if TYPE_CHECKING:
    from jaxtune.api import FastLanguageModel, add_new_tokens
    from jaxtune.data.apply_template import apply_chat_template, construct_chat_template
    from jaxtune.data.masking import train_on_responses_only
    from jaxtune.data.merging import to_sharegpt
    from jaxtune.data.sharegpt import standardize_data_formats, standardize_sharegpt
    from jaxtune.data.templates import get_chat_template
    from jaxtune.exportable import Exportable
    from jaxtune.language_model import LanguageModel
    from jaxtune.pushable import Pushable
    from jaxtune.rl import GRPOConfig, GRPOTrainer
    from jaxtune.training import EarlyStoppingCallback, SFTConfig, SFTTrainer, TrainerCallback
    from jaxtune.unsloth_names import (
        UnslothTrainer,
        UnslothTrainingArguments,
        is_bfloat16_supported,
        unsloth_train,
    )

_HOME = {
    "EarlyStoppingCallback": "jaxtune.training",
    "Exportable": "jaxtune.exportable",
    "FastLanguageModel": "jaxtune.api",
    "LanguageModel": "jaxtune.language_model",
    "Pushable": "jaxtune.pushable",
    "GRPOConfig": "jaxtune.rl",
    "GRPOTrainer": "jaxtune.rl",
    "SFTConfig": "jaxtune.training",
    "SFTTrainer": "jaxtune.training",
    "TrainerCallback": "jaxtune.training",
    "UnslothTrainer": "jaxtune.unsloth_names",
    "UnslothTrainingArguments": "jaxtune.unsloth_names",
    "add_new_tokens": "jaxtune.api",
    "apply_chat_template": "jaxtune.data.apply_template",
    "construct_chat_template": "jaxtune.data.apply_template",
    "get_chat_template": "jaxtune.data.templates",
    "is_bfloat16_supported": "jaxtune.unsloth_names",
    "standardize_data_formats": "jaxtune.data.sharegpt",
    "standardize_sharegpt": "jaxtune.data.sharegpt",
    "to_sharegpt": "jaxtune.data.merging",
    "train_on_responses_only": "jaxtune.data.masking",
    "unsloth_train": "jaxtune.unsloth_names",
}

__all__ = [
    "EarlyStoppingCallback",
    "Exportable",
    "FastLanguageModel",
    "GRPOConfig",
    "GRPOTrainer",
    "LanguageModel",
    "Pushable",
    "SFTConfig",
    "SFTTrainer",
    "TrainerCallback",
    "UnslothTrainer",
    "UnslothTrainingArguments",
    "__version__",
    "add_new_tokens",
    "apply_chat_template",
    "construct_chat_template",
    "get_chat_template",
    "is_bfloat16_supported",
    "standardize_data_formats",
    "standardize_sharegpt",
    "to_sharegpt",
    "train_on_responses_only",
    "unsloth_train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
