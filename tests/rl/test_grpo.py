"""GRPOTrainer and its settings: a reward rises, and each field of GRPOConfig changes what it says it changes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import LanguageModel, get_chat_template
from jaxtune.errors import OutputFolderError, RewardError
from jaxtune.rl import GRPOConfig, GRPOTrainer
from jaxtune.rl.grpo import loss_of
from jaxtune.training.trainer import optimizer_of
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_close, assert_trees_equal
from tests.kit.disk import files_of_at_most

ROWS = [{"prompt": "the quick brown fox" * (1 + i % 3) + " jumps" * i, "low": 64} for i in range(6)]
BASE = dict(
    num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3, num_iterations=2,
    max_completion_length=8, learning_rate=3e-3, beta=0.05, warmup_ratio=0.0, epsilon=0.1,
    gradient_checkpointing=False,
)  # fmt: skip


def low_share(completion_ids, low, **_):
    """The share of the tokens below 64."""
    return [np.mean(np.array(ids) < limit) for ids, limit in zip(completion_ids, low, strict=True)]


def high_share(completion_ids, low, **_):
    return [1 - share for share in low_share(completion_ids, low)]


def last_is_even(completion_ids):
    return [float(ids[-1] % 2 == 0) for ids in completion_ids]


@pytest.fixture(scope="module")
def model():
    """Its head is sharp, so that hidden states can say what comes next; a token in twelve ends a completion."""
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    params = tiny.params(causal_lm)
    params["lm_head"]["weight"] = 4 * params["lm_head"]["weight"]
    stop_ids = tuple(range(0, models.VOCAB, 12))
    return LanguageModel(
        causal_lm, params, tiny.lora(causal_lm), models.tokenizer(), max_seq_length=128, stop_ids=stop_ids
    )


def train(model, reward_funcs=(low_share, last_is_even), rows=ROWS, **settings):
    """A run on a copy of the model."""
    args = GRPOConfig(**{**BASE, **settings})
    trainer = GRPOTrainer(dataclasses.replace(model), list(reward_funcs), args, train_dataset=rows)
    trainer.output = trainer.train()
    return trainer


@pytest.fixture(scope="module")
def baseline(model):
    return train(model)


def column(trainer, name):
    return [record[name] for record in trainer.log_history]


@pytest.mark.parametrize("reward", [low_share, high_share])
def test_the_mean_reward_rises(model, reward):
    trainer = train(
        model,
        [reward],
        max_steps=15,
        num_iterations=1,
        beta=0.0,
        num_generations=8,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",
    )
    rewards = column(trainer, "reward")
    assert 0.2 < rewards[0] < 0.8
    assert np.mean(rewards[-3:]) > 0.95
    assert column(trainer, f"rewards/{reward.__name__}/mean") == rewards


def test_training_changes_the_adapter_and_nothing_else(model, baseline):
    assert baseline.model.params is model.params
    for a, b in zip(*map(jax.tree.leaves, (baseline.model.lora, model.lora)), strict=True):
        assert not np.array_equal(a, b)


def first_batch(model, **settings):
    """What the first step would train on, and how often."""
    args = GRPOConfig(**{**BASE, "beta": 0.0, "num_iterations": 1, **settings})
    trainer = GRPOTrainer(model, [low_share, last_is_even], args, train_dataset=ROWS)
    batches = trainer.batches(lambda: (model.params, model.lora))
    return next(batches)[0], next(batches)[0]


@pytest.fixture(scope="module")
def plain_batch(model):
    return first_batch(model)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 1},
        {"num_generations": 8},
        {"max_prompt_length": 3},
        {"max_completion_length": 5},
        {"temperature": 0.8},
        {"loss_type": "grpo"},
        {"loss_type": "bnpo"},
        {"loss_type": "dr_grpo"},
        {"scale_rewards": "batch"},
        {"scale_rewards": False},
        {"reward_weights": [1.0, 0.1]},
        {"mask_truncated_completions": True},
    ],
    ids=str,
)
def test_a_setting_changes_what_a_step_trains_on(model, plain_batch, settings):
    batch, _ = first_batch(model, **settings)
    assert batch.keys() == plain_batch.keys()
    same_shape = batch["tokens"].shape == plain_batch["tokens"].shape
    assert not (same_shape and all(np.allclose(batch[name], plain_batch[name]) for name in batch))


def test_beta_and_iterations_are_what_costs_a_forward_pass_more(model, plain_batch):
    assert not {"old_logps", "ref_logps"} & set(plain_batch)
    batch, again = first_batch(model, beta=0.1, num_iterations=2)
    assert {"old_logps", "ref_logps"} <= set(batch)
    for name in batch:
        np.testing.assert_array_equal(batch[name], again[name])


@pytest.mark.parametrize(
    "settings",
    [{"beta": 0.5}, {"use_bias_correction_kl": False}, {"epsilon": 0.05}, {"epsilon_high": 0.3}],
    ids=str,
)
def test_a_setting_of_the_objective_changes_it(settings):
    policy = lambda lora, params, batch: (batch["logps"], jnp.zeros((2, 8)))

    def loss(**settings):
        function = loss_of(GRPOConfig(**{**BASE, **settings}), policy)
        rng = np.random.default_rng(0)
        names = ("logps", "old_logps", "ref_logps", "advantages")
        batch = {name: jnp.asarray(rng.normal(0, 0.3, (2, 8)), "float32") for name in names}
        return function(None, {}, {**batch, "weights": jnp.ones((2, 8))})[0]

    assert not np.allclose(loss(**settings), loss(), rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"max_grad_norm": 1e-6}, {"num_iterations": 1}, {"temperature": 0.8}], ids=str
)
def test_a_setting_changes_the_run(model, baseline, settings):
    trained = train(model, **settings)
    leaves = zip(*map(jax.tree.leaves, (trained.model.lora, baseline.model.lora)), strict=True)
    assert not all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in leaves)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e-3},
        {"lr_scheduler_type": "cosine"},
        {"warmup_steps": 2},
        {"warmup_steps": 0.5},
        {"warmup_ratio": 0.5},
        {"weight_decay": 0.9},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1e-2},
        {"optim": "adamw_torch"},
    ],
    ids=str,
)
def test_a_setting_of_the_optimizer_changes_its_updates(settings):
    def after_three_steps(**settings):
        optimizer, _ = optimizer_of(GRPOConfig(**{**BASE, **settings}), total_steps=4)
        weights = {"a": jnp.ones(4096)}
        state = optimizer.init(weights)
        for gradient in (0.5, -2.0, 1.0):
            updates, state = optimizer.update({"a": gradient * jnp.linspace(0.1, 1, 4096)}, state, weights)
            weights = jax.tree.map(jnp.add, weights, updates)
        return weights["a"]

    assert not np.allclose(after_three_steps(**settings), after_three_steps(), rtol=1e-6)


def test_gradient_checkpointing_keeps_the_result(model, baseline):
    checkpointed = train(model, gradient_checkpointing="unsloth")
    np.testing.assert_allclose(column(checkpointed, "loss"), column(baseline, "loss"), rtol=1e-3, atol=1e-5)


def test_steps_iterations_and_epochs(model, baseline):
    """Two prompts a step, six prompts, every rollout used twice."""
    assert column(baseline, "step") == [1, 2, 3]
    assert column(baseline, "epoch") == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    rewards = column(baseline, "reward")
    assert rewards[0] == rewards[1] != rewards[2]
    np.testing.assert_array_equal(np.diff(column(baseline, "num_tokens")) > 0, [False, True])
    clipped = column(baseline, "clip_ratio/region_mean")
    assert clipped[0] == clipped[2] == 0 < clipped[1]
    longer = GRPOConfig(**{**BASE, "max_steps": -1, "num_train_epochs": 1.5})
    assert longer.total_steps(3, uses=longer.num_iterations) == 10  # 9 prompts take 5 rollouts


def test_what_is_logged_has_trls_names(model, baseline):
    record = baseline.log_history[0]
    names = """
        loss grad_norm learning_rate epoch num_tokens reward reward_std frac_reward_zero_std kl entropy
        rewards/low_share/mean rewards/low_share/std rewards/last_is_even/mean rewards/last_is_even/std
        clip_ratio/low_mean clip_ratio/high_mean clip_ratio/region_mean
        completions/mean_length completions/min_length completions/max_length completions/clipped_ratio
        completions/mean_terminated_length completions/min_terminated_length completions/max_terminated_length
        """.split()
    assert set(names) <= set(record)
    assert record["reward"] == pytest.approx(
        record["rewards/low_share/mean"] + record["rewards/last_is_even/mean"]
    )
    assert record["completions/min_length"] <= record["completions/mean_length"] <= 8
    assert 0 < record["completions/clipped_ratio"] < 1


def test_the_logged_entropy_is_that_of_what_tokens_were_drawn_from(model):
    """One token after one prompt, drawn many times over: whatever was drawn, from one distribution."""
    trainer = train(
        model,
        [last_is_even],
        ROWS[:1],
        max_steps=1,
        max_completion_length=1,
        num_iterations=1,
        temperature=0.4,
    )
    ids = jnp.asarray([trainer.prompts[0].ids])
    logps = jax.nn.log_softmax(model.apply(model.params, model.lora, ids)[0, -1] / 0.4)
    entropy = -(jnp.exp(logps) * logps).sum()
    np.testing.assert_allclose(trainer.log_history[0]["entropy"], entropy, rtol=1e-4)


def test_an_adapter_that_is_silent_has_no_divergence_from_the_reference(model, baseline):
    silent = jax.tree.map(jnp.zeros_like, model.lora)
    trainer = train(dataclasses.replace(model, lora=silent), max_steps=1)
    assert trainer.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert baseline.log_history[0]["kl"] > 1e-3


def test_what_train_returns(baseline):
    output = baseline.output
    assert output.global_step == 3
    np.testing.assert_allclose(output.training_loss, np.mean(column(baseline, "loss")))
    assert output.metrics["epoch"] == pytest.approx(2 / 3)


def test_the_log_averages_and_leaves_the_run_as_it_is_to_the_bit(model, baseline, tmp_path):
    trainer = train(model, logging_steps=2, output_dir=tmp_path / "run")
    assert_trees_equal(trainer.model.lora, baseline.model.lora)
    assert column(trainer, "step") == [2, 3]
    for name in ("loss", "reward", "entropy", "kl"):
        each = column(baseline, name)
        np.testing.assert_allclose(column(trainer, name), [np.mean(each[:2]), each[2]], rtol=1e-5, atol=1e-7)
    assert column(trainer, "num_tokens") == column(baseline, "num_tokens")[1:]
    first, *lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["settings"]["num_generations"] == 4
    assert lines == trainer.log_history


def test_what_is_seen_of_a_run(model, baseline, tmp_path):
    """The mechanisms are the trainers' common ones (tests/training/test_seeing.py)."""
    args = GRPOConfig(**{**BASE, "output_dir": tmp_path / "run", "report_samples": 2, "run_name": "foxes"})
    notes = []

    class Notes:
        def on_log(self, args, state, control, logs, **more):
            notes.append(logs)

    trainer = GRPOTrainer(
        dataclasses.replace(model), [low_share, last_is_even], args, train_dataset=ROWS, callbacks=[Notes()]
    )
    trainer.train()
    assert_trees_equal(trainer.model.lora, baseline.model.lora)
    assert notes == trainer.log_history
    assert [axes.get_title() for axes in trainer.plot().axes][:2] == ["loss", "reward"]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<h1>foxes</h1>" in text and "rewards/low_share/mean goes from" in text
    assert text.count("<dt>before</dt>") == 2 and "in the dataset" not in text


def test_conversations(model):
    """Prompts are rendered up to the assistant's turn; completions are messages."""
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml")
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions, columns))
        return [float(len(completion[0]["content"])) for completion in completions]

    rows = [
        {"prompt": [{"role": "user", "content": f"the fox {i}"}], "answer": i, "completion": "unused"}
        for i in range(2)
    ]
    args = GRPOConfig(**{**BASE, "max_steps": 1})
    trainer = GRPOTrainer(
        dataclasses.replace(model, stop_ids=()), reward, args, train_dataset=rows, processing_class=tokenizer
    )
    texts = [tokenizer.decode(prompt.ids) for prompt in trainer.prompts]
    assert texts[1] == "<|im_start|>user\nthe fox 1<|im_end|>\n<|im_start|>assistant\n"
    assert trainer.stop_ids == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    trainer.train()
    prompts, completions, columns = seen[0]
    assert len(prompts) == len(completions) == 8
    assert {completion[0]["role"] for completion in completions} == {"assistant"}
    assert [rows[answer]["prompt"] for answer in columns["answer"]] == prompts
    assert set(columns) == {"answer", "completion_ids", "trainer_state", "log_extra", "log_metric"}


NO_REFERENCE = dict(beta=0.0, num_iterations=1, max_steps=2, weight_decay=0.0)


def test_on_policy_the_loss_is_minus_the_mean_advantage(model):
    """Which is 0 over whole groups, whatever the policy; and without a reference there is no divergence from it."""
    trainer = train(model, [low_share], loss_type="grpo", **NO_REFERENCE)
    assert np.abs(column(trainer, "loss")).max() < 1e-5
    assert min(column(trainer, "grad_norm")) > 1e-3
    assert "kl" not in trainer.log_history[0]


def test_completions_that_no_function_judges_teach_nothing_and_are_mentioned_once(model, caplog):
    """Those of every other prompt: the others' rewards are all alike, so nothing is learnt at all."""

    def every_other(prompts):
        first = prompts[0]
        return [1.0 if prompt == first else None for prompt in prompts]

    trainer = train(model, [every_other], **NO_REFERENCE)
    assert_trees_equal(trainer.model.lora, model.lora)
    assert sum("have the same reward" in message for message in caplog.messages) == 1
    assert sum("no reward function had an answer" in message for message in caplog.messages) == 1
    assert column(trainer, "reward") == [1, 1]


def test_a_step_of_nothing_but_masked_completions_changes_nothing(model):
    endless = dataclasses.replace(model, stop_ids=(), tokenizer=models.fresh_tokenizer())
    endless.tokenizer.eos_token = None
    trainer = train(endless, mask_truncated_completions=True, **NO_REFERENCE)
    assert_trees_close(trainer.model.lora, model.lora, 1e-7)
    assert column(trainer, "completions/clipped_ratio") == [1, 1]
    assert column(trainer, "loss") == [0, 0]


def test_a_reward_function_that_fails_late_does_not_lose_what_was_learnt(model, baseline):
    calls = []

    def fails_second_time(completion_ids, low):
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("answer")
        return low_share(completion_ids, low)

    kept = dataclasses.replace(model)
    trainer = GRPOTrainer(kept, fails_second_time, GRPOConfig(**BASE), train_dataset=ROWS)
    with pytest.raises(RewardError, match="fails_second_time"):
        trainer.train()
    assert kept.lora is not model.lora
    assert [record["step"] for record in trainer.log_history] == [1]


def test_what_a_reward_function_does_to_its_arguments_is_its_own_affair(model, baseline):
    def last_is_even(prompts, completions, completion_ids, low):
        rewards = [float(ids.pop() % 2 == 0) for ids in completion_ids]
        completions[:] = prompts[:] = low[:] = []
        return rewards

    trainer = train(model, [low_share, last_is_even])
    assert_trees_equal(trainer.model.lora, baseline.model.lora)
    assert column(trainer, "completions/mean_length") == column(baseline, "completions/mean_length")


def test_a_run_that_fails_leaves_its_settings_and_no_table_of_an_older_one(model, tmp_path):
    def never(completions):
        return [None] * len(completions)

    folder = tmp_path / "run"
    train(model, log_completions=True, output_dir=folder, max_steps=1)
    assert (folder / "completions.jsonl").is_file()
    with pytest.raises(RewardError, match="None or NaN for all"):
        train(model, [never], output_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "report.html"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_disk_that_fills_up_during_a_run_does_not_lose_what_was_learnt(model, tmp_path):
    kept = dataclasses.replace(model)
    args = GRPOConfig(**BASE, output_dir=tmp_path / "run")
    trainer = GRPOTrainer(kept, [low_share], args, train_dataset=ROWS)
    with files_of_at_most(2000), pytest.raises(OutputFolderError, match=r"metrics\.jsonl"):
        trainer.train()
    assert kept.lora is not model.lora
    jax.block_until_ready(kept.lora)


def test_what_reward_functions_log_and_the_table_of_completions(model, tmp_path):
    states = []

    def noted(prompts, completion_ids, low, trainer_state, log_extra, log_metric):
        states.append(trainer_state)
        log_metric("longest", len(max(completion_ids, key=len)))
        log_metric("longest", 0)
        log_extra("tokens", completion_ids)
        log_extra("weight", [0.0] * 5 + [2.5, np.float32(6), float("nan")])
        return [None if i == 0 else float(i) for i in range(len(prompts))]

    trainer = train(model, [noted], log_completions=True, output_dir=tmp_path / "run", **NO_REFERENCE)
    assert [state.global_step for state in states] == [0, 1]
    assert {state.max_steps for state in states} == {2}
    assert [state.epoch for state in states] == pytest.approx([0, 1 / 3])
    lines = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1] * 8 + [2] * 8
    first = [len(row["tokens"]) for row in rows[:8]]
    assert trainer.log_history[0]["longest"] == max(first) / 2
    assert [row["rewards/noted"] for row in rows[:8]] == [None, 1, 2, 3, 4, 5, 6, 7]
    assert rows[0]["prompt"] in {row["prompt"] for row in ROWS}
    assert rows[0]["advantage"] == 0 < rows[7]["advantage"]
    assert isinstance(rows[0]["completion"], str)
    assert [row["weight"] for row in rows[5:8]] == [2.5, 6.0, None]
