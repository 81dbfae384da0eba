"""SFTConfig: the settings of a supervised run."""

import dataclasses

from jaxtune.options import ANY, mirrors
from jaxtune.training.config import WITHOUT_EFFECT
from jaxtune.training.keeping_config import KeepingConfig

_WITHOUT_EFFECT = {
    **WITHOUT_EFFECT,
    "dataset_num_proc": ANY,
    "remove_unused_columns": ANY,
    "padding_free": ANY,
    "packing": False,
    "loss_type": ("nll", None),
}


@mirrors(_WITHOUT_EFFECT, aliases={"max_seq_length": "max_length", "evaluation_strategy": "eval_strategy"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(KeepingConfig):
    max_length: int | None = None
    """Tokens that a sample may have before it is cut; None takes the model's max_seq_length."""
    dataset_text_field: str = "text"
    """The column of plain text."""
    completion_only_loss: bool | None = None
    """Train on completions alone; None does so for prompt/completion data."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns alone, as the chat template marks them."""
    cache_tokens: bool = True
    """Keep the tokens of datasets of a thousand rows or more in the user's cache folder, where the next run finds them
    by content: of the rows, the tokenizer and these settings."""

    def __post_init__(self):
        super().__post_init__()
        self.require_counts("max_length", or_none=True)
        self.require_switches("assistant_only_loss", "cache_tokens")
