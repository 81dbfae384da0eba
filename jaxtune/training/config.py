"""TrainingConfig: the settings that every trainer has, under TRL's names and, where the two differ, Unsloth's defaults;
and the checks that all configs are made of."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from jaxtune.errors import OptionError, nearest
from jaxtune.log import get_logger, show
from jaxtune.training.optimizers import OPTIMIZERS, PAGED, arguments
from jaxtune.training.remat import level
from jaxtune.training.schedules import SCHEDULES, what_is_wrong

log = get_logger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    output_dir: str | Path | None = None
    """Where metrics.jsonl, report.html and what else is written go; None writes nothing."""
    per_device_train_batch_size: int = 4
    """Samples in a micro-batch; for GRPO, completions."""
    gradient_accumulation_steps: int = 2
    """Micro-batches in an optimizer step."""
    num_train_epochs: float = 3.0
    """Passes over the dataset, unless max_steps says otherwise."""
    max_steps: int = -1
    """Optimizer steps in all; -1 leaves it to num_train_epochs."""
    learning_rate: float = 5e-5
    """The highest rate of the schedule."""
    embedding_learning_rate: float | None = None
    """The same for embedding and head, where they are trained; None is learning_rate."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: how many times learning_rate the B of adapters have. An embedding_learning_rate goes before it."""
    lr_scheduler_type: str = "linear"
    """constant, constant_with_warmup, cosine, cosine_with_min_lr, cosine_with_restarts, inverse_sqrt, linear,
    polynomial or warmup_stable_decay."""
    lr_scheduler_kwargs: dict[str, Any] | None = None
    """What else the schedule takes, by transformers' names: {"num_cycles": 3}, {"min_lr_rate": 0.1}."""
    warmup_steps: float | None = None
    """Steps over which the rate rises from 0; below 1, a part of all steps. None leaves it to warmup_ratio."""
    warmup_ratio: float = 0.1
    """The part of all steps over which it rises, rounded up."""
    optim: str = "adamw_8bit"
    """AdamW: adamw_8bit keeps its moments in 8 bits (also adamw_bnb_8bit and paged_adamw_8bit), adamw_torch in float32
    (also adamw, adamw_hf, adamw_torch_fused, adamw_apex_fused and paged_adamw_32bit). Lion: lion_8bit, lion_32bit and
    both with paged_. Others: adafactor, muon (AdamW for what is no matrix of a layer), rmsprop, schedule_free_adamw
    and sgd."""
    optim_args: str | None = None
    """What only one optimizer has, by torch's names: "momentum=0.9, nesterov=True" for sgd; alpha, eps, momentum and
    centered for rmsprop."""
    weight_decay: float = 0.001
    """Weight decay: of the gradient for sgd and rmsprop, decoupled for all others."""
    adam_beta1: float = 0.9
    """Decay of AdamW's mean gradient, and of what Lion takes the sign of; how near to the average schedule_free_adamw
    computes gradients."""
    adam_beta2: float = 0.999
    """Decay of AdamW's mean squared gradient, and of what Lion keeps."""
    adam_epsilon: float = 1e-8
    """What AdamW adds to its denominator."""
    max_grad_norm: float | None = 1.0
    """Gradients are shrunk to this global norm; None or 0 leaves them alone."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the host's memory: a step fetches and returns it over the bus."""
    skip_nonfinite_steps: int = 0
    """So many steps in a row may have a loss or a gradient that is not finite: they change nothing. One more ends the
    run."""
    gradient_checkpointing: bool | str | None = None
    """True, False, "unsloth" or a level of training.remat; None takes what the model was loaded with."""
    seed: int = 3407
    """Of the order of the data, and of everything that is drawn."""

    def __post_init__(self):
        self.require_counts("per_device_train_batch_size", "gradient_accumulation_steps")
        self.require_at_least(0, "learning_rate", "weight_decay", "adam_epsilon")
        self.require_at_least(0, "warmup_steps", "max_grad_norm", or_none=True)
        self.require_at_least(0, "embedding_learning_rate", "loraplus_lr_ratio", or_none=True)
        has_ratio = self.embedding_learning_rate is None or self.learning_rate > 0
        self.require(has_ratio, "learning_rate", "more than 0 beside an embedding_learning_rate")
        self.require_at_least(0, "adam_beta1", "adam_beta2", "warmup_ratio", "num_train_epochs")
        for name in ("adam_beta1", "adam_beta2"):
            self.require(getattr(self, name) < 1, name, "a number from 0 to below 1")
        self.require(self.warmup_ratio <= 1, "warmup_ratio", "a part of all steps, from 0 to 1")
        steps = "a whole number of steps, or -1 to count epochs"
        self.require(
            _is_whole(self.max_steps) and (self.max_steps >= 1 or self.max_steps == -1), "max_steps", steps
        )
        self.require(self.max_steps != -1 or self.num_train_epochs > 0, "num_train_epochs", "more than 0")
        self.require_one_of(tuple(SCHEDULES), "lr_scheduler_type")
        self._require_schedule()
        self.require_one_of((*OPTIMIZERS, *PAGED), "optim")
        self.require_switches("offload_optimizer")
        skips = self.skip_nonfinite_steps
        is_number = _is_whole(skips) and skips >= 0
        self.require(is_number, "skip_nonfinite_steps", "a whole number of steps in a row; 0 skips none")
        if self.optim == "schedule_free_adamw":
            self.require(self.adam_beta1 > 0, "adam_beta1", "more than 0 for schedule_free_adamw")
        self._require_optim_args()
        if self.optim in PAGED:
            show()
            log.info(
                "%s: optim=%r is %s: nothing is paged; offload_optimizer=True keeps its state on the host.",
                type(self).__name__, self.optim, PAGED[self.optim],
            )  # fmt: skip
        self.require(_is_whole(self.seed) and self.seed >= 0, "seed", "a whole number of at least 0")
        self.require(isinstance(self.output_dir, str | Path | None), "output_dir", "a path, or None")
        if self.gradient_checkpointing is not None:
            level(self.gradient_checkpointing)

    def _require_optim_args(self) -> None:
        name = "optim_args"
        self.require(isinstance(self.optim_args, str | None), name, "text such as 'momentum=0.9', or None")
        try:
            arguments(self.optim, self.optim_args)
        except ValueError as wrong:
            self.require(False, name, *wrong.args)

    def _require_schedule(self) -> None:
        settings, name = self.lr_scheduler_kwargs, "lr_scheduler_kwargs"
        self.require(isinstance(settings, dict | None), name, "a dict of the schedule's settings, or None")
        if wrong := what_is_wrong(self.lr_scheduler_type, settings or {}, self.learning_rate):
            self.require(False, name, *wrong)

    def total_steps(self, batches_per_epoch: float, uses: int = 1) -> int:
        """Optimizer steps of the run, `uses` for every batch."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * batches_per_epoch) * uses

    def warmup(self, total_steps: int) -> int:
        steps = self.warmup_ratio if self.warmup_steps is None else self.warmup_steps
        is_part = self.warmup_steps is None or steps < 1
        return math.ceil(steps * total_steps) if is_part else int(steps)

    def require(self, is_so: bool, name: str, expected: str, near: str = "") -> None:
        """Raises, naming the field and its value, unless `is_so`."""
        if not is_so:
            value = getattr(self, name)
            raise OptionError(
                f"{type(self).__name__}: {name}={value!r}.",
                expected=f"{expected}.",
                fix=f"Correct {name}.{near}",
            )

    def require_counts(self, *names: str, or_none: bool = False) -> None:
        """Whole numbers from 1 on."""
        for name in names:
            value = getattr(self, name)
            is_count = (value is None and or_none) or (_is_whole(value) and value >= 1)
            self.require(is_count, name, "a whole number of at least 1")

    def require_at_least(self, least: float, *names: str, or_none: bool = False) -> None:
        for name in names:
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and value >= least
            self.require((value is None and or_none) or is_number, name, f"a number of at least {least}")

    def require_switches(self, *names: str) -> None:
        for name in names:
            self.require(isinstance(getattr(self, name), bool), name, "True or False")

    def require_one_of(self, known: tuple[str, ...], name: str) -> None:
        value = getattr(self, name)
        self.require(value in known, name, f"one of {', '.join(known)}", nearest(str(value), known))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
