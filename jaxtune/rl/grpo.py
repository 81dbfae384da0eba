"""GRPOTrainer: reinforces a model's adapter with reward functions, under TRL's names.

A step samples completions from the arrays that it trains, asks the reward functions, compares each completion with the
others of its prompt, and takes an optimizer step (or `num_iterations`) on what came out. The loop is that of SFT.
"""

import copy
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.data.layout import Limits
from jaxtune.errors import OptionError
from jaxtune.inference.generate import ends
from jaxtune.log import get_logger
from jaxtune.lora.config import PISSA
from jaxtune.models.causal_lm import Params
from jaxtune.models.layer_loop import Remat
from jaxtune.options import mirrors
from jaxtune.rl import completions
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.losses import group_advantages, sequence_weights, total_rewards
from jaxtune.rl.metrics import completion_facts, reward_facts
from jaxtune.rl.policy import (
    LogProbsAndEntropy,
    grpo_loss,
    log_probs,
    log_probs_and_entropy,
    of_all_micro_batches,
)
from jaxtune.rl.prompts import Prompt, read_prompts, steps
from jaxtune.rl.rewards import RewardFunction, RewardFunctions, TrainerState
from jaxtune.rl.rollout import Rollout, lay_out_rollout, roll_out, shapes
from jaxtune.training.losses import MicroBatch, WatchedLoss
from jaxtune.training.run_report import Shown
from jaxtune.training.trained import Newest, Trainable
from jaxtune.training.trainer import Trainer, TrainOutput

log = get_logger(__name__)

Facts = dict[str, float]


class Judgement(NamedTuple):
    """What the reward functions make of a rollout."""

    advantages_S: np.ndarray
    facts: Facts
    table: list[dict[str, Any]]
    """A row for each completion: what was asked, what was written, what it was worth."""


@mirrors(
    {
        "eval_dataset": None,
        "reward_processing_classes": None,
        "peft_config": None,
        "quantization_config": None,
        "optimizers": ((None, None), None),
        "tools": (None, []),
        "rollout_func": None,
        "environment_factory": None,
    }
)
class GRPOTrainer(Trainer):
    """Tokenises the prompts when it is made; `train()` runs it and leaves the trained adapter in `model.lora`, or with
    full fine-tuning the trained weights in `model.params`.

    `reward_funcs` is one function or several (see `rl.rewards`); `log_history` is every logged step's numbers."""

    config_type = GRPOConfig
    method = "grpo"
    headline = ("reward", "loss")
    args: GRPOConfig

    def __init__(
        self,
        model: Trainable,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        *,
        processing_class: Any = None,
        tokenizer: Any = None,
        callbacks: Any = None,
    ):
        """
        Args:
            model: What is trained: its adapter, or with full fine-tuning its weights.
            reward_funcs: One function or several (see `rl.rewards`).
            args: The settings; None takes their defaults.
            train_dataset: Rows with a `prompt`; what else they have, the reward functions get.
            processing_class: The tokenizer; None takes the model's.
            tokenizer: The same by its older name.
            callbacks: TrainerCallbacks.
        """
        super().__init__(
            model,
            args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            tokenizer=tokenizer,
            callbacks=callbacks,
        )
        config = model.causal_lm.lora_config
        if self.args.beta > 0 and config is not None and config.init_lora_weights == PISSA:
            raise OptionError(
                f"beta={self.args.beta} with an adapter that began with init_lora_weights='pissa'.",
                expected="a base that is the reference: this one lacks what the adapter took out of it.",
                fix="Use beta=0, or another init_lora_weights.",
            )
        if self.processing_class is None:
            raise OptionError(
                "GRPOTrainer was given no tokenizer, and the model has none.",
                expected="the model's tokenizer.",
                fix="Pass processing_class=tokenizer.",
            )
        self.reward_functions = RewardFunctions(reward_funcs)
        self.reward_weights = _weights(self.args.reward_weights, len(self.reward_functions.names))
        max_prompt_length = _max_prompt_length(self.args, model.max_seq_length)
        self.prompts: list[Prompt] = read_prompts(train_dataset, self.processing_class, max_prompt_length)
        self.reward_functions.require(list(dict.fromkeys(name for p in self.prompts for name in p.columns)))
        self.stop_ids = ends(model.stop_ids, self.processing_class)
        self._said: set[str] = set()

    def _shown(self, count: int) -> list[Shown]:
        return [Shown(prompt.ids, None) for prompt in self.prompts[:count]]

    @property
    def _total_steps(self) -> int:
        rollouts_per_epoch = len(self.prompts) / self.args.prompts_per_step
        return self.args.total_steps(rollouts_per_epoch, uses=self.args.num_iterations)

    def train(self) -> TrainOutput:
        self._said.clear()

        def loss_at(remat: Remat) -> WatchedLoss:
            function = log_probs_and_entropy(
                self.model.causal_lm, self.args.temperature, remat, entropy_gradient=False
            )
            return loss_of(self.args, function)

        return self._train(loss_at, self.batches, self._total_steps)

    def batches(self, newest: Newest) -> Iterator[tuple[MicroBatch, Facts]]:
        """Endless batches, `num_iterations` times each, from rollouts of what `newest()` returns at that moment, and
        what there is to say about them."""
        args, model = self.args, self.model
        key = jax.random.key(args.seed)
        longest = max(len(prompt.ids) for prompt in self.prompts) + args.max_completion_length
        menu = shapes(Limits(args.gradient_accumulation_steps, args.per_device_train_batch_size, longest))
        score = of_all_micro_batches(log_probs(model.causal_lm, args.temperature))
        num_tokens, number = 0, 0
        reference = _reference(model) if args.beta > 0 else None
        for turn, prompts in enumerate(steps(self.prompts, args.prompts_per_step, args.seed)):
            params, lora = newest()
            rollout = roll_out(
                model.causal_lm,
                params,
                lora,
                [prompt.ids for prompt in prompts],
                num_generations=args.num_generations,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                stop_ids=self.stop_ids,
                key=jax.random.fold_in(key, turn),
            )
            state = TrainerState(number, self._total_steps, self._epoch(number))
            advantages_S, facts, table = self._judge(prompts, rollout, state)
            if args.log_completions:
                assert args.output_dir is not None
                completions.write(Path(args.output_dir), number + 1, table)
            trained_S = rollout.finished_S | (not args.mask_truncated_completions)
            weights_S = sequence_weights(
                args.loss_type,
                jnp.asarray(rollout.lengths_S * trained_S),
                micro_batch=args.per_device_train_batch_size,
                max_completion_length=args.max_completion_length,
            )
            values = {"advantages": advantages_S, "weights": np.asarray(weights_S)}
            batch = jax.device_put(lay_out_rollout(rollout, trained_S, menu, **values))
            # Both from the same arrays: neither is to be among the other's arguments.
            old = {"old_logps": score(lora, params, batch)} if args.num_iterations > 1 else {}
            ref = {} if reference is None else {"ref_logps": score(None, reference, batch)}
            num_tokens += rollout.num_tokens
            facts |= {"num_tokens": num_tokens, "samples": float(args.completions_per_step)}
            for _ in range(args.num_iterations):
                number += 1
                yield {**batch, **old, **ref}, {**facts, "epoch": self._epoch(number)}

    def _judge(self, prompts: list[Prompt], rollout: Rollout, state: TrainerState) -> Judgement:
        args = self.args
        repeated = [prompt for prompt in prompts for _ in range(args.num_generations)]
        texts = self.processing_class.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        logged = completions.Logged(len(repeated))
        # Copies: what a function does to them is its own affair.
        given: dict[str, Any] = {
            **{name: [copy.deepcopy(p.columns.get(name)) for p in repeated] for name in columns},
            "prompts": [copy.deepcopy(prompt.prompt) for prompt in repeated],
            "completions": [
                text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(repeated, texts, strict=True)
            ],
            "completion_ids": [list(ids) for ids in rollout.completion_ids],
            "trainer_state": state,
            "log_extra": logged.extra,
            "log_metric": logged.metric,
        }
        names = self.reward_functions.names
        rewards_SF = self.reward_functions.score(given, len(repeated))
        silent = int(np.isnan(rewards_SF).all(axis=1).sum())
        if silent:
            self._say_once(
                "these are not learned from",
                f"no reward function had an answer (but None or NaN) for {silent} of {len(rewards_SF)} completions",
            )
        total_S, advantages_S, std_S = jax.device_get(
            _advantages(rewards_SF, self.reward_weights, args.num_generations, args.scale_rewards)
        )
        if not advantages_S.any():
            self._say_once(
                "there is nothing to learn from this", "all completions of each prompt have the same reward"
            )
        facts = reward_facts(names, rewards_SF, total_S, std_S)
        rewards = {name: rewards_SF[:, i] for i, name in enumerate(names)}
        table = completions.table(
            {"prompt": [prompt.prompt for prompt in repeated], "completion": texts},
            {**{f"rewards/{name}": each for name, each in rewards.items()}, "advantage": advantages_S},
            logged.columns,
        )
        return Judgement(advantages_S, {**logged.means, **facts, **completion_facts(rollout)}, table)

    def _say_once(self, what: str, detail: str) -> None:
        if what not in self._said:
            self._said.add(what)
            log.warning("%s: %s (said once, for the first step where it happens)", detail, what)

    def _epoch(self, steps_done: int) -> float:
        rollouts = -(-steps_done // self.args.num_iterations)
        return rollouts * self.args.prompts_per_step / len(self.prompts)


def loss_of(args: GRPOConfig, function: LogProbsAndEntropy) -> WatchedLoss:
    """The objective as the settings have it."""
    return grpo_loss(
        function,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
    )


def _reference(model: Trainable) -> Params:
    """What the policy is held to: the base, which an adapter leaves as it is, or a copy of weights about to change."""
    return jax.tree.map(jnp.copy, model.params) if model.lora is None else model.params


@functools.partial(jax.jit, static_argnums=(2, 3))
def _advantages(rewards_SF, weights_F, num_generations, scale):
    total_S = total_rewards(rewards_SF, weights_F)
    return total_S, *group_advantages(total_S, num_generations, scale)


def _weights(weights: Sequence[float] | None, num_functions: int) -> np.ndarray:
    weights = [1.0] * num_functions if weights is None else list(weights)
    if len(weights) != num_functions:
        raise OptionError(
            f"GRPOConfig: reward_weights has {len(weights)} values for {num_functions} reward functions.",
            expected="one for each function.",
            fix="Correct reward_weights, or leave it out to weigh all with 1.",
        )
    return np.asarray(weights, np.float32)


def _max_prompt_length(args: GRPOConfig, max_seq_length: int) -> int:
    room = max_seq_length - args.max_completion_length
    if room < (args.max_prompt_length or 1):
        raise OptionError(
            f"max_completion_length={args.max_completion_length} and "
            f"max_prompt_length={args.max_prompt_length} in a max_seq_length of {max_seq_length}.",
            expected="room for both.",
            fix="Lower them, or load the model with a larger max_seq_length.",
        )
    return args.max_prompt_length or room
