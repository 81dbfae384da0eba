"""GRPOConfig: the settings of a GRPO run. The objective's defaults are TRL's, the rest Unsloth's."""

import dataclasses
import math
from collections.abc import Sequence

from jaxtune.errors import OptionError
from jaxtune.options import ANY, mirrors
from jaxtune.rl.losses import LOSS_TYPES, SCALES
from jaxtune.training.seeing_config import SeeingConfig
from jaxtune.training.without_effect import WITHOUT_EFFECT

_WITHOUT_EFFECT = {
    **WITHOUT_EFFECT,
    # Rollouts use the trainer's own arrays: there is no second engine to set up.
    "use_vllm": ANY,
    "vllm_mode": ANY,
    "vllm_gpu_memory_utilization": ANY,
    "vllm_tensor_parallel_size": ANY,
    "vllm_enable_sleep_mode": ANY,
    "vllm_importance_sampling_correction": ANY,
    "vllm_importance_sampling_mode": ANY,
    "vllm_importance_sampling_cap": ANY,
    "vllm_importance_sampling_clip_max": ANY,
    "vllm_importance_sampling_clip_min": ANY,
    "vllm_model_impl": ANY,
    "vllm_max_model_length": ANY,
    "vllm_server_base_url": ANY,
    "vllm_server_host": ANY,
    "vllm_server_port": ANY,
    "vllm_server_timeout": ANY,
    "vllm_group_port": ANY,
    "vllm_structured_outputs_regex": None,
    "use_transformers_continuous_batching": ANY,
    "transformers_continuous_batching_config": ANY,
    "use_transformers_paged": ANY,
    "cache_implementation": ANY,
    "ds3_gather_for_generation": ANY,
    "unsloth_num_chunks": ANY,
    "unsloth_logit_chunk_multiplier": ANY,
    "unsloth_grpo_mini_batch": ANY,
    "disable_dropout": ANY,
    "neftune_noise_alpha": None,
    "remove_unused_columns": False,
    "num_completions_to_print": ANY,
    "num_generations_eval": ANY,
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
    "label_smoothing_factor": 0.0,
    "cast_lm_head_to_fp32": ANY,  # the head's products are summed in float32
    "log_multimodal": ANY,
    "log_unique_prompts": False,
    "log_completions_hub_repo": None,
    "max_tool_calling_iterations": ANY,
    # Of what is refused when it is asked for: a synchronised reference, adaptive entropy, other losses.
    "ref_model_mixup_alpha": ANY,
    "ref_model_sync_steps": ANY,
    "entropy_coef_min": ANY,
    "entropy_coef_max": ANY,
    "entropy_coef_delta": ANY,
    "entropy_target": ANY,
    "sapo_temperature_neg": ANY,
    "sapo_temperature_pos": ANY,
    "vespo_k_pos": ANY,
    "vespo_lambda_pos": ANY,
    "vespo_k_neg": ANY,
    "vespo_lambda_neg": ANY,
}


@mirrors(_WITHOUT_EFFECT, aliases={"activation_checkpointing": "gradient_checkpointing"})
@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig(SeeingConfig):
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
    """Weight of the divergence from the base model without any adapter; 0 does not compute it. (TRL takes the adapter
    as it was at the beginning: the same for a fresh one.)"""
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
    log_completions: bool = False
    """Write every completion, with what it was worth, to completions.jsonl in output_dir."""

    def __post_init__(self):
        if isinstance(self.scale_rewards, bool):
            object.__setattr__(self, "scale_rewards", "group" if self.scale_rewards else "none")
        if self.reward_weights is not None:
            object.__setattr__(self, "reward_weights", self._weights())
        super().__post_init__()
        self.require_counts("num_generations", "max_completion_length", "num_iterations")
        self.require_counts("max_prompt_length", or_none=True)
        self.require_at_least(0, "temperature", "beta", "epsilon")
        self.require_at_least(0, "epsilon_high", or_none=True)
        group = "at least 2: a completion is judged by the others of its prompt"
        self.require(self.num_generations >= 2, "num_generations", group)
        self.require(
            self.temperature > 0, "temperature", "more than 0: completions of a prompt have to differ"
        )
        self.require_switches("use_bias_correction_kl", "mask_truncated_completions", "log_completions")
        self.require_one_of(LOSS_TYPES, "loss_type")
        self.require_one_of(SCALES, "scale_rewards")
        if self.log_completions:
            where = "an output_dir to write them to"
            self.require(self.output_dir is not None, "log_completions", where)
        if self.completions_per_step % self.num_generations:
            raise self._not_whole_groups()

    @property
    def completions_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def prompts_per_step(self) -> int:
        return self.completions_per_step // self.num_generations

    def _weights(self) -> tuple[float, ...]:
        try:
            weights = tuple(map(float, self.reward_weights or ()))
        except (TypeError, ValueError):
            weights = ()
        is_list = bool(weights) and all(map(math.isfinite, weights))
        self.require(is_list, "reward_weights", "a list with a finite number for each reward function")
        return weights

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
