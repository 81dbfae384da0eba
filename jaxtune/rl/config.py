"""GRPOConfig: the settings of a GRPO run, under TRL's names and, where the two differ, Unsloth's defaults."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from jaxtune.errors import OptionError, nearest
from jaxtune.options import ANY, mirrors
from jaxtune.rl.losses import LOSS_TYPES, SCALES
from jaxtune.training.config import WITHOUT_EFFECT as WITHOUT_EFFECT_IN_SFT
from jaxtune.training.optimizers import SCHEDULES
from jaxtune.training.remat import level

_SFT_ONLY = ("dataset_num_proc", "packing", "padding_free", "loss_type", "remove_unused_columns")

WITHOUT_EFFECT = {
    **{name: neutral for name, neutral in WITHOUT_EFFECT_IN_SFT.items() if name not in _SFT_ONLY},
    # Rollouts use the trainer's own arrays: there is no second engine to set up.
    "use_vllm": ANY,
    "vllm_mode": ANY,
    "vllm_gpu_memory_utilization": ANY,
    "vllm_tensor_parallel_size": ANY,
    "vllm_enable_sleep_mode": ANY,
    "vllm_importance_sampling_correction": ANY,
    "unsloth_num_chunks": ANY,
    "unsloth_logit_chunk_multiplier": ANY,
    "unsloth_grpo_mini_batch": ANY,
    "disable_dropout": ANY,
    "pad_to_multiple_of": ANY,
    "log_completions": False,
    "remove_unused_columns": False,
    "shuffle_dataset": True,
    "top_p": 1.0,
    "top_k": (0, -1, None),
    "min_p": (None, 0.0),
    "repetition_penalty": 1.0,
    "generation_kwargs": (None, {}),
    "chat_template_kwargs": (None, {}),
    "generation_batch_size": None,
    "steps_per_generation": None,
    "vllm_sampling_params": None,
    "delta": None,
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "off_policy_mask_threshold": None,
    "sync_ref_model": False,
}
"""Names that a TRL or Unsloth script may pass although they mean nothing here, or only with the value given."""


_AT_LEAST = {
    "num_generations": 1,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "temperature": 0,
    "beta": 0,
    "epsilon": 0,
    "epsilon_high": 0,
    "num_iterations": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "logging_steps": 1,
}
_MAY_BE_NONE = ("max_prompt_length", "epsilon_high", "warmup_steps", "max_grad_norm")
_WHOLE = (
    "num_generations",
    "max_prompt_length",
    "max_completion_length",
    "num_iterations",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_steps",
    "logging_steps",
)


@mirrors(WITHOUT_EFFECT)
@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    output_dir: str | Path | None = None
    """Where metrics.jsonl goes; None writes nothing."""
    num_generations: int = 8
    """Completions of one prompt, which are compared with one another."""
    max_prompt_length: int | None = None
    """Tokens that a prompt may have; longer ones keep their last. None: what max_completion_length leaves of the
    model's max_seq_length."""
    max_completion_length: int = 512
    """Tokens after which a completion is cut off."""
    temperature: float = 1.0
    """Of the sampling, and of the log-probabilities that are trained."""
    loss_type: str = "dapo"
    """What the loss is a mean over: dapo, the tokens of the step; bnpo, those of each micro-batch; grpo, each
    completion's tokens, then completions; dr_grpo, the tokens that there could have been."""
    beta: float = 0.0
    """Weight of the divergence from the base model; 0 does not compute it."""
    use_bias_correction_kl: bool = True
    """Weight the divergence by the ratio of new to old probability, which matters once num_iterations is above 1 and
    for the gradient always."""
    epsilon: float = 0.2
    """How far below 1 the ratio of new to old probability may fall before it is clipped."""
    epsilon_high: float | None = None
    """How far above 1 it may rise; None is epsilon."""
    scale_rewards: str | bool = "group"
    """The standard deviation that advantages are divided by: of the group (or True), of the batch, or none (or
    False)."""
    reward_weights: Sequence[float] | None = None
    """One for each reward function; None weighs all with 1."""
    mask_truncated_completions: bool = False
    """Do not train on completions that were cut off."""
    num_iterations: int = 1
    """Optimizer steps on the same completions."""
    per_device_train_batch_size: int = 4
    """Completions in a micro-batch."""
    gradient_accumulation_steps: int = 2
    """Micro-batches in an optimizer step; times the batch size, it must be a multiple of num_generations."""
    num_train_epochs: float = 3.0
    """Passes over the prompts, unless max_steps says otherwise."""
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
    gradient_checkpointing: bool | str | None = None
    """True, False, "unsloth" or a level of training.remat; None takes what the model was loaded with."""
    logging_steps: int = 1
    """Steps between two lines of the log, which holds the means over them."""
    seed: int = 3407
    """Of the order of the prompts and of the sampling."""

    def __post_init__(self):
        if isinstance(self.scale_rewards, bool):
            object.__setattr__(self, "scale_rewards", "group" if self.scale_rewards else "none")
        self._check_numbers()
        for name, known in {
            "loss_type": LOSS_TYPES,
            "scale_rewards": SCALES,
            "lr_scheduler_type": SCHEDULES,
        }.items():
            if (value := getattr(self, name)) not in known:
                raise _bad(name, value, f"one of {', '.join(known)}", nearest(str(value), known))
        if self.gradient_checkpointing is not None:
            level(self.gradient_checkpointing)
        if self.completions_per_step % self.num_generations:
            raise self._not_whole_groups()

    def _check_numbers(self):
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= least:
                raise _bad(name, value, f"a number of at least {least}")
        for name in _WHOLE:
            if not isinstance(value := getattr(self, name), int | None):
                raise _bad(name, value, "a whole number")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _bad(name, getattr(self, name), "a number from 0 to below 1")
        if not self.num_generations >= 2:
            expected = "at least 2: a completion is judged by the others of its prompt"
            raise _bad("num_generations", self.num_generations, expected)
        if not self.temperature > 0:
            raise _bad("temperature", self.temperature, "more than 0: completions of a prompt have to differ")
        if not 0 <= self.warmup_ratio <= 1:
            raise _bad("warmup_ratio", self.warmup_ratio, "a part of all steps, from 0 to 1")
        if self.max_steps != -1 and self.max_steps < 1:
            raise _bad("max_steps", self.max_steps, "a number of steps, or -1 to count epochs")
        if self.max_steps == -1 and not self.num_train_epochs > 0:
            raise _bad("num_train_epochs", self.num_train_epochs, "more than 0")

    @property
    def completions_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        return self.completions_per_step // self.num_generations

    def total_steps(self, num_prompts: int) -> int:
        """Optimizer steps of the run, `num_iterations` for every rollout."""
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.num_train_epochs * num_prompts / self.prompts_per_step) * self.num_iterations

    def warmup(self, total_steps: int) -> int:
        steps = self.warmup_ratio if self.warmup_steps is None else self.warmup_steps
        is_part = self.warmup_steps is None or steps < 1
        return math.ceil(steps * total_steps) if is_part else int(steps)

    def _not_whole_groups(self) -> OptionError:
        batch, steps, group = (
            self.per_device_train_batch_size,
            self.gradient_accumulation_steps,
            self.num_generations,
        )
        step = group // math.gcd(batch, group)
        valid_steps = [n for n in (steps // step * step, (steps // step + 1) * step) if n > 0]
        divisors = [n for n in range(2, batch * steps + 1) if (batch * steps) % n == 0]
        nearest_groups = sorted(sorted(divisors, key=lambda n: abs(n - group))[:2])
        fix = f"Set gradient_accumulation_steps to {_or(valid_steps)}"
        fix += f", or num_generations to {_or(nearest_groups)}." if nearest_groups else "."
        return OptionError(
            f"GRPOConfig: per_device_train_batch_size {batch} x gradient_accumulation_steps {steps} is "
            f"{batch * steps} completions in a step, with num_generations={group}.",
            expected=f"whole groups: a multiple of {group}.",
            fix=fix,
        )


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _bad(name: str, value: object, expected: str, near: str = "") -> OptionError:
    return OptionError(
        f"GRPOConfig: {name}={value!r}.", expected=expected + ".", fix=f"Correct {name}.{near}"
    )
