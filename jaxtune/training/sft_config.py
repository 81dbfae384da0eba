"""SFTConfig: the settings of a supervised run."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxtune.data.formats import TRUNCATION_MODES
from jaxtune.data.packing import STRATEGIES
from jaxtune.log import get_logger, show
from jaxtune.options import ANY, mirrors
from jaxtune.training.keeping_config import KeepingConfig
from jaxtune.training.losses import LOSS_TYPES
from jaxtune.training.without_effect import WITHOUT_EFFECT

_WITHOUT_EFFECT = {
    **WITHOUT_EFFECT,
    "dataset_num_proc": ANY,
    "remove_unused_columns": ANY,
    "padding_free": ANY,
    "pad_to_multiple_of": ANY,
    "group_by_length": ANY,
    "length_column_name": ANY,
    "dataset_batch_size": ANY,
    "activation_offloading": False,
}
_DATASET_KWARGS = ("add_special_tokens", "skip_prepare_dataset", "append_concat_token")
"""What TRL, or an older TRL, takes in dataset_kwargs. Only the first has an effect: rows of tokens are never prepared
again, and samples end with eos, packed or not."""
_BY_LENGTH = ("group_by_length", "batch_rebalance")

log = get_logger(__name__)


_ALIASES = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "activation_checkpointing": "gradient_checkpointing",
}


@mirrors(_WITHOUT_EFFECT, aliases=_ALIASES)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(KeepingConfig):
    max_length: int | None = None
    """Tokens that a sample, or a packed row, may have. None is the model's max_seq_length, which is also the most."""
    truncation_mode: str = "keep_start"
    """What is kept of a longer sample: keep_start, or keep_end. Its labels go with its tokens; a sample that has none
    left to train on is dropped, which is said."""
    packing: bool = False
    """Lay samples together in rows of at most max_length tokens, each of which counts as one of a batch's samples. No
    token sees another sample, and what is trained on is the same."""
    packing_strategy: str = "bfd"
    """How: bfd, best-fit decreasing, of samples cut to max_length; bfd_split, the same, and what is cut off lies in
    a row too; wrapped, one after the other, cut where a row ends. The first token after such a cut is not trained
    on, as it sees nothing before it."""
    eval_packing: bool | None = None
    """The same for evaluations; None does as packing says."""
    shuffle_dataset: bool = False
    """Shuffle the samples before they are packed, or before a sequential run."""
    train_sampling_strategy: str = "random"
    """The order in an epoch: random, another in each, or sequential, the dataset's. Samples lie end to end without
    padding, so that group_by_length and batch_rebalance have nothing to save, and are taken for random."""
    data_seed: int | None = None
    """Of the order in an epoch; None takes seed."""
    dataloader_drop_last: bool = False
    """Leave out of each epoch what does not fill a batch of per_device_train_batch_size."""
    dataset_text_field: str = "text"
    """The column of plain text."""
    completion_only_loss: bool | None = None
    """Train on completions alone; None does so for prompt/completion data."""
    assistant_only_loss: bool = False
    """Train on the assistant's turns alone, as the chat template marks them."""
    eos_token: str | None = None
    """Becomes the tokenizer's eos token, which ends texts; one of its vocabulary."""
    pad_token: str | None = None
    """Becomes the tokenizer's pad token. Nothing is padded with it here; it is saved with the tokenizer."""
    chat_template_path: str | Path | None = None
    """A Jinja file, or a folder or hub id with a tokenizer, whose chat template (and eos) the tokenizer gets."""
    dataset_kwargs: dict[str, Any] | None = None
    """{"add_special_tokens": False} tokenises plain texts as they stand, without adding bos or eos."""
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
        self.require_switches("assistant_only_loss", "cache_tokens", "packing", "shuffle_dataset")
        self.require_switches("dataloader_drop_last")
        self.require(self.eval_packing in (None, True, False), "eval_packing", "True, False or None")
        self.require_one_of(TRUNCATION_MODES, "truncation_mode")
        self.require_one_of(tuple(STRATEGIES), "packing_strategy")
        self.require_one_of(("random", "sequential", *_BY_LENGTH), "train_sampling_strategy")
        if self.train_sampling_strategy in _BY_LENGTH:
            show()
            log.info("SFTConfig: train_sampling_strategy=%r is random.", self.train_sampling_strategy)
        is_seed = self.data_seed is None or (type(self.data_seed) is int and self.data_seed >= 0)
        self.require(is_seed, "data_seed", "a whole number of at least 0, or None")
        self._require_dataset_kwargs()
        self.require_one_of(LOSS_TYPES, "loss_type")
        self.require_at_least(0, "label_smoothing_factor", "z_loss_weight")
        self.require_at_least(0, "neftune_noise_alpha", or_none=True)
        self.require(self.label_smoothing_factor < 1, "label_smoothing_factor", "a number from 0 to below 1")
        for name in ("label_smoothing_factor", "z_loss_weight"):
            goes_with_type = getattr(self, name) == 0 or self.loss_type == "nll"
            self.require(goes_with_type, name, f"0 with loss_type={self.loss_type!r}")

    def _require_dataset_kwargs(self) -> None:
        given = self.dataset_kwargs or {}
        known = isinstance(given, dict) and all(
            name in _DATASET_KWARGS and isinstance(value, bool) for name, value in given.items()
        )
        names = ", ".join(_DATASET_KWARGS)
        self.require(known, "dataset_kwargs", f"a dict with some of {names}, each True or False; or None")
        if unused := [name for name in given if name != "add_special_tokens"]:
            show()
            log.info("SFTConfig: %s in dataset_kwargs has no effect in jaxtune.", " and ".join(unused))

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def packs_evaluations(self) -> bool:
        return self.packing if self.eval_packing is None else self.eval_packing

    def cuts_before_packing(self, packs: bool) -> bool:
        """Whether samples are cut to max_length when they are prepared; all strategies but one cut them later."""
        return not packs or self.packing_strategy == "bfd"
