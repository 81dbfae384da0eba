"""SFTConfig: the settings of a supervised run."""

import dataclasses

from jaxtune.options import ANY, mirrors
from jaxtune.training.config import WITHOUT_EFFECT
from jaxtune.training.keeping_config import KeepingConfig
from jaxtune.training.losses import LOSS_TYPES

_WITHOUT_EFFECT = {
    **WITHOUT_EFFECT,
    "dataset_num_proc": ANY,
    "remove_unused_columns": ANY,
    "padding_free": ANY,
    "packing": False,
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
    loss_type: str = "nll"
    """nll: -log p of each token; dft (dynamic fine-tuning): the same times p, as a constant."""
    label_smoothing_factor: float = 0.0
    """The part of each token's label that is spread over the vocabulary; with loss_type nll."""
    neftune_noise_alpha: float | None = None
    """NEFTune: noise on the embeddings while training, of up to alpha / sqrt(tokens of the sample x hidden size)."""
    z_loss_weight: float = 0.0
    """How much the square of the logits' logsumexp adds to each token's loss, which keeps logits from drifting
    (PaLM: 1e-4); with loss_type nll."""

    def __post_init__(self):
        super().__post_init__()
        self.require_counts("max_length", or_none=True)
        self.require_switches("assistant_only_loss", "cache_tokens")
        self.require_one_of(LOSS_TYPES, "loss_type")
        self.require_at_least(0, "label_smoothing_factor", "z_loss_weight")
        self.require_at_least(0, "neftune_noise_alpha", or_none=True)
        self.require(self.label_smoothing_factor < 1, "label_smoothing_factor", "a number from 0 to below 1")
        for name in ("label_smoothing_factor", "z_loss_weight"):
            goes_with_type = getattr(self, name) == 0 or self.loss_type == "nll"
            self.require(goes_with_type, name, f"0 with loss_type={self.loss_type!r}")
