"""GRPOTrainer: reinforces a model's adapter with reward functions, under TRL's names.

A step samples completions from the arrays that it trains, asks the reward functions, compares each completion with the
others of its prompt, and takes an optimizer step (or `num_iterations`) on what came out. The loop is that of SFT.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtune.data.layout import Limits
from jaxtune.errors import AdapterError, OptionError
from jaxtune.log import get_logger, show
from jaxtune.models.causal_lm import Lora
from jaxtune.options import mirrors
from jaxtune.rl import rewards
from jaxtune.rl.config import GRPOConfig
from jaxtune.rl.losses import group_advantages, sequence_weights, total_rewards
from jaxtune.rl.metrics import average, completion_facts, reward_facts
from jaxtune.rl.policy import LogProbs, LossAndSums, grpo_loss, log_probs, of_all_micro_batches
from jaxtune.rl.prompts import Prompt, read_prompts, steps
from jaxtune.rl.rollout import Rollout, lay_out_rollout, roll_out, shapes
from jaxtune.rl.step import make_step
from jaxtune.training.loop import Record, run
from jaxtune.training.losses import MicroBatch
from jaxtune.training.metrics import RunLog
from jaxtune.training.optimizers import Schedule, adamw, schedule
from jaxtune.training.remat import level, remat
from jaxtune.training.sft import Trainable, TrainOutput
from jaxtune.training.step import TrainState, init_state

log = get_logger(__name__)

Facts = dict[str, float]


class Policy(Trainable, Protocol):
    """What the trainer needs of a model; `jaxtune.LanguageModel` is one."""

    stop_ids: tuple[int, ...]


@mirrors(
    {
        "eval_dataset": None,
        "reward_processing_classes": None,
        "callbacks": (None, []),
        "peft_config": None,
        "optimizers": ((None, None), None),
        "tools": (None, []),
        "rollout_func": None,
        "environment_factory": None,
    }
)
class GRPOTrainer:
    """Tokenises the prompts when it is made; `train()` runs it and leaves the trained adapter in `model.lora`.

    `reward_funcs` is one function or several (see `rl.rewards`); `log_history` is every logged step's numbers."""

    def __init__(
        self,
        model: Policy,
        reward_funcs: rewards.RewardFunction | Sequence[rewards.RewardFunction],
        args: GRPOConfig | None = None,
        *,
        train_dataset: Any = None,
        processing_class: Any = None,
        tokenizer: Any = None,
    ):
        show()
        if not isinstance(args, GRPOConfig | None):
            raise OptionError(
                f"GRPOTrainer's args is a {type(args).__name__}.",
                expected="a GRPOConfig.",
                fix="Pass args=GRPOConfig(...).",
            )
        if model.lora is None:
            raise AdapterError(
                "The model has no adapter to train.",
                expected="a model that went through FastLanguageModel.get_peft_model.",
                fix="Call FastLanguageModel.get_peft_model(model) first.",
            )
        if train_dataset is None:
            raise OptionError(
                "GRPOTrainer was given no train_dataset.",
                expected="a dataset with a column `prompt`.",
                fix="Pass train_dataset=...",
            )
        self.model, self.args = model, args or GRPOConfig()
        self.processing_class: Any = next(
            (t for t in (processing_class, tokenizer, model.tokenizer) if t is not None), None
        )
        if self.processing_class is None:
            raise OptionError(
                "GRPOTrainer was given no tokenizer, and the model has none.",
                expected="the model's tokenizer.",
                fix="Pass processing_class=tokenizer.",
            )
        self.reward_funcs = rewards.named(reward_funcs)
        self.reward_weights = _weights(self.args.reward_weights, self.reward_funcs)
        max_prompt_length = _max_prompt_length(self.args, model.max_seq_length)
        self.prompts: list[Prompt] = read_prompts(train_dataset, self.processing_class, max_prompt_length)
        eos = getattr(self.processing_class, "eos_token_id", None)
        self.stop_ids = tuple(dict.fromkeys([*model.stop_ids, *([] if eos is None else [int(eos)])]))
        self.log_history: list[Record] = []
        self._warned_of_silence = False

    def train(self) -> TrainOutput:
        args, model = self.args, self.model
        total = args.total_steps(len(self.prompts))
        optimizer, rate = optimizer_of(args, total)
        checkpointing = args.gradient_checkpointing
        checkpointing = model.gradient_checkpointing if checkpointing is None else checkpointing
        function = log_probs(model.causal_lm, args.temperature, remat(level(checkpointing)))
        step = make_step(loss_of(args, function), optimizer, rate, args.max_grad_norm or None)
        assert model.lora is not None
        state = init_state(model.lora, optimizer)

        def on_state(newest: TrainState) -> None:
            nonlocal state  # rollouts sample from the newest adapter; the one before is consumed
            state = newest

        self.log_history = []
        self._warned_of_silence = False
        losses: list[float] = []
        unlogged: list[Record] = []
        started = time.perf_counter()
        with RunLog(args, total) as output:  # type: ignore[arg-type]  # it reads the fields that all configs have

            def on_record(record: Record) -> None:
                losses.append(record["loss"])
                unlogged.append(record)
                if len(losses) % args.logging_steps == 0 or len(losses) == total:
                    self.log_history.append(average(unlogged))
                    unlogged.clear()
                    output.write(self.log_history[-1])
                output.advance()

            batches = itertools.islice(self.batches(lambda: state.lora), total)
            try:
                run(step, state, model.params, batches, on_record, on_state)
            except (KeyboardInterrupt, rewards.RewardError):
                model.lora = state.lora  # what was learnt so far is not lost
                raise
        model.lora = state.lora
        runtime = time.perf_counter() - started
        mean = sum(losses) / total
        metrics = {
            "train_runtime": runtime,
            "train_samples_per_second": total * args.completions_per_step / runtime,
            "train_steps_per_second": total / runtime,
            "train_loss": mean,
            "epoch": self._epoch(total),
        }
        return TrainOutput(total, mean, metrics)

    def batches(self, newest: Callable[[], Lora]) -> Iterator[tuple[MicroBatch, Facts]]:
        """Endless batches, `num_iterations` times each, from rollouts of what `newest()` returns at that moment, and
        what there is to say about them."""
        args, model = self.args, self.model
        key = jax.random.key(args.seed)
        longest = max(len(prompt.ids) for prompt in self.prompts) + args.max_completion_length
        menu = shapes(Limits(args.gradient_accumulation_steps, args.per_device_train_batch_size, longest))
        score = of_all_micro_batches(log_probs(model.causal_lm, args.temperature))
        num_tokens, number = 0, 0
        for turn, prompts in enumerate(steps(self.prompts, args.prompts_per_step, args.seed)):
            lora = newest()
            rollout = roll_out(
                model.causal_lm,
                model.params,
                lora,
                [prompt.ids for prompt in prompts],
                num_generations=args.num_generations,
                max_completion_length=args.max_completion_length,
                temperature=args.temperature,
                stop_ids=self.stop_ids,
                key=jax.random.fold_in(key, turn),
            )
            advantages_S, facts = self._judge(prompts, rollout)
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
            old = {"old_logps": score(lora, model.params, batch)} if args.num_iterations > 1 else {}
            reference = {"ref_logps": score(None, model.params, batch)} if args.beta > 0 else {}
            num_tokens += rollout.num_tokens
            for _ in range(args.num_iterations):
                number += 1
                yield (
                    {**batch, **old, **reference},
                    {**facts, "num_tokens": float(num_tokens), "epoch": self._epoch(number)},
                )

    def _judge(self, prompts: list[Prompt], rollout: Rollout) -> tuple[np.ndarray, Facts]:
        """Advantages [S] of the completions, and what there is to say about their rewards and lengths."""
        args = self.args
        repeated = [prompt for prompt in prompts for _ in range(args.num_generations)]
        texts = self.processing_class.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        columns = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        given = {
            "prompts": [prompt.prompt for prompt in repeated],
            "completions": [
                text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": text}]
                for prompt, text in zip(repeated, texts, strict=True)
            ],
            "completion_ids": rollout.completion_ids,
            **{name: [prompt.columns.get(name) for prompt in repeated] for name in columns},
        }
        rewards_SF = rewards.score(self.reward_funcs, given, len(repeated))
        silent = int(np.isnan(rewards_SF).all(axis=1).sum())
        if silent and not self._warned_of_silence:
            self._warned_of_silence = True
            log.warning(
                "no reward function had an answer for %d of %d completions: these are not learned from "
                "(said once, for the first step where it happens)",
                silent,
                len(rewards_SF),
            )
        total_S, advantages_S, std_S = jax.device_get(
            _advantages(rewards_SF, self.reward_weights, args.num_generations, args.scale_rewards)
        )
        facts = reward_facts(list(self.reward_funcs), rewards_SF, total_S, std_S)
        return advantages_S, {**facts, **completion_facts(rollout)}

    def _epoch(self, steps_done: int) -> float:
        rollouts = -(-steps_done // self.args.num_iterations)
        return rollouts * self.args.prompts_per_step / len(self.prompts)


def loss_of(args: GRPOConfig, function: LogProbs) -> LossAndSums:
    """The objective as the settings have it."""
    return grpo_loss(
        function,
        epsilon=args.epsilon,
        epsilon_high=args.epsilon_high,
        beta=args.beta,
        use_bias_correction_kl=args.use_bias_correction_kl,
    )


def optimizer_of(args: GRPOConfig, total_steps: int) -> tuple[optax.GradientTransformation, Schedule]:
    """AdamW as the settings have it, and its rate at every step."""
    rate = schedule(args.lr_scheduler_type, args.learning_rate, args.warmup(total_steps), total_steps)
    optimizer = adamw(
        rate,
        beta1=args.adam_beta1,
        beta2=args.adam_beta2,
        epsilon=args.adam_epsilon,
        weight_decay=args.weight_decay,
    )
    return optimizer, rate


@functools.partial(jax.jit, static_argnums=(2, 3))
def _advantages(rewards_SF, weights_F, num_generations, scale):
    total_S = total_rewards(rewards_SF, weights_F)
    return total_S, *group_advantages(total_S, num_generations, scale)


def _weights(weights: Sequence[float] | None, functions: dict[str, Any]) -> np.ndarray:
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise OptionError(
            f"GRPOConfig: reward_weights has {len(weights)} values for {len(functions)} reward functions.",
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
