"""What goes wrong with settings, datasets and reward functions: typed errors that say what to do."""

import asyncio
import dataclasses
import functools
import time

import numpy as np
import pytest

from jaxtune import LanguageModel, SFTConfig
from jaxtune.errors import AdapterError, DatasetError, OptionError, RewardError, TrainingError
from jaxtune.rl import GRPOConfig, GRPOTrainer
from jaxtune.rl.completions import Logged
from jaxtune.rl.prompts import read_prompts, steps
from jaxtune.rl.rewards import RewardFunctions
from tests.kit import models, tiny


def ones(completions):
    return [1.0] * len(completions)


def needs_a_column(completions, ground_truth):
    return ones(completions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 1}, "num_generations=1"),
        ({"num_generations": 4.0}, "num_generations=4.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": None}, "temperature=None"),
        ({"beta": -0.1}, "beta=-0.1"),
        ({"epsilon": -0.1}, "epsilon=-0.1"),
        ({"num_iterations": 0}, "num_iterations=0"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_steps": 0}, "max_steps=0"),
        ({"num_train_epochs": 0}, "num_train_epochs=0"),
        ({"warmup_ratio": 2}, "warmup_ratio=2"),
        ({"adam_beta1": 1.0}, "adam_beta1=1.0"),
        ({"loss_type": "drgrpo"}, "'dr_grpo'"),
        ({"scale_rewards": "groups"}, "'group'"),
        ({"lr_scheduler_type": "liner"}, "'linear'"),
        ({"gradient_checkpointing": "blok"}, "'block'"),
        ({"num_generation": 4}, "'num_generations'"),
        ({"importance_sampling_level": "sequence"}, "does not support"),
        ({"delta": 2.0}, "does not support"),
        ({"top_p": 0.9}, "does not support"),
        ({"log_completions": True}, "log_completions=True"),
        ({"reward_weights": ["a"]}, "reward_weights="),
        ({"reward_weights": 1.0}, "reward_weights=1.0"),
        ({"reward_weights": [float("nan")]}, "reward_weights="),
        ({"warmup_ratio": "0.1"}, "warmup_ratio='0.1'"),
        ({"adam_beta1": None}, "adam_beta1=None"),
        ({"num_train_epochs": "3"}, "num_train_epochs='3'"),
        ({"seed": "a"}, "seed='a'"),
        ({"mask_truncated_completions": "no"}, "mask_truncated_completions='no'"),
        ({"output_dir": 3}, "output_dir=3"),
        ({"save_steps": 100}, "save_steps=100, which this version does not support"),
    ],
    ids=str,
)
def test_settings(settings, message):
    with pytest.raises(OptionError, match=message):
        GRPOConfig(**settings)


@pytest.mark.parametrize(
    ("batch", "accumulation", "group", "fixes"),
    [
        (4, 3, 8, "gradient_accumulation_steps to 2 or 4, or num_generations to 4 or 6"),
        (1, 4, 8, "gradient_accumulation_steps to 8, or num_generations to 2 or 4"),
        (1, 1, 8, "gradient_accumulation_steps to 8."),
    ],
)
def test_a_step_that_is_not_whole_groups_names_the_nearest_that_are(batch, accumulation, group, fixes):
    settings = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    with pytest.raises(OptionError) as raised:
        GRPOConfig(num_generations=group, **settings)
    assert fixes in raised.value.fix


def test_names_of_trl_and_unsloth_scripts_are_accepted(caplog):
    with caplog.at_level("INFO", "jaxtune"):
        GRPOConfig(use_vllm=True, vllm_gpu_memory_utilization=0.6, report_to="none", top_p=1.0, bf16=True)
    assert [message.split()[1] for message in caplog.messages] == [
        "use_vllm",
        "vllm_gpu_memory_utilization",
        "bf16",
    ]
    assert GRPOConfig(scale_rewards=True).scale_rewards == "group"


@pytest.fixture(scope="module")
def model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(causal_lm, {}, tiny.lora(causal_lm), models.tokenizer(), max_seq_length=64)


SHORT = GRPOConfig(max_completion_length=8)
ROWS = [{"prompt": "the fox"}]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"train_dataset": None}, OptionError, "no train_dataset"),
        ({"args": SFTConfig()}, OptionError, "SFTConfig"),
        ({"args": GRPOConfig(max_completion_length=64)}, OptionError, "room for both"),
        ({"args": GRPOConfig(max_completion_length=8, max_prompt_length=60)}, OptionError, "room for both"),
        (
            {"args": GRPOConfig(max_completion_length=8, reward_weights=[1, 2])},
            OptionError,
            "2 values for 1 reward",
        ),
        ({"eval_dataset": ROWS}, OptionError, "eval_dataset"),
        ({"reward_funcs": "org/reward-model"}, OptionError, "reward models"),
        ({"reward_funcs": []}, OptionError, "reward_funcs"),
        ({"reward_funcs": [ones, functools.partial(ones)]}, OptionError, "named 'ones'"),
        ({"train_dataset": []}, DatasetError, "no rows"),
        ({"train_dataset": [{"prompts": "a"}]}, DatasetError, "no 'prompt'"),
        ({"train_dataset": [{"promt": "a"}]}, DatasetError, "'promt'"),
        ({"train_dataset": [{"prompt": "a", "completions": 1}]}, DatasetError, "completions"),
        ({"train_dataset": [{"prompt": "a"}, {"prompt": None}]}, DatasetError, "row 1"),
        ({"train_dataset": [{"prompt": "a"}, {"text": "a"}]}, DatasetError, "row 1"),
        ({"train_dataset": [{"prompt": "a"}, {"prompt": ""}]}, DatasetError, "row 1"),
        ({"train_dataset": [{"prompt": []}]}, DatasetError, "row 0"),
        ({"train_dataset": [{"prompt": 3}]}, DatasetError, "row 0"),
        ({"model": "org/model"}, OptionError, "the model 'org/model'"),
        ({"reward_funcs": needs_a_column}, OptionError, "'needs_a_column' takes 'ground_truth'"),
        (
            {"reward_funcs": needs_a_column, "train_dataset": [{"prompt": "a", "ground_truths": "b"}]},
            OptionError,
            "Did you mean 'ground_truths'",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),  # a function's text has its address
)
def test_what_the_trainer_is_given(model, given, error, message):
    with pytest.raises(error, match=message):
        GRPOTrainer(**{"model": model, "reward_funcs": ones, "args": SHORT, "train_dataset": ROWS, **given})


def test_what_the_model_lacks(model):
    with pytest.raises(AdapterError, match="no adapter"):
        GRPOTrainer(dataclasses.replace(model, lora=None), ones, SHORT, train_dataset=ROWS)
    with pytest.raises(OptionError, match="no tokenizer"):
        GRPOTrainer(dataclasses.replace(model, tokenizer=None), ones, SHORT, train_dataset=ROWS)


def fails(completions):
    raise KeyError("answer")


async def fails_later(completions):
    fails(completions)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fails, "'fails' raised KeyError: 'answer'"),
        (lambda completions: [1.0], "1 values for 2"),
        (lambda completions: None, "NoneType"),
        (lambda completions: 1.0, "float"),
        (lambda completions: "ab", "str"),
        (lambda completions: ["good", "bad"], "'good'"),
        (lambda completions: ["1", "2"], "'1'"),
        (lambda completions: [1.0, float("inf")], "inf"),
        (lambda completions: [[1.0, 2.0], [3.0]], "1.0, 2.0"),
        (lambda unknown: [1.0, 2.0], "unknown"),
        (lambda completions: [None, float("nan")], "None or NaN for all"),
        (fails_later, "'fails_later' raised KeyError: 'answer'"),
    ],
)
def test_reward_functions_that_fail(function, message):
    with pytest.raises(RewardError, match=message) as raised:
        RewardFunctions(function).score({"completions": ["a", "b"]}, 2)
    assert isinstance(raised.value, TrainingError)


def test_reward_functions_get_what_they_name_and_may_return_any_numbers():
    seen = {}

    def everything(**given):
        seen.update(given)
        return np.array([1.0, 2.0])

    def some(answer, completions):
        return [True, None]

    given = {"prompts": ["p", "p"], "completions": ["a", "b"], "completion_ids": [[1], [2]], "answer": [3, 4]}
    functions = RewardFunctions(
        [everything, some, functools.partial(lambda completions, k: [k, float("nan")], k=5)]
    )
    scores = functions.score(given, 2)
    assert seen == given
    np.testing.assert_array_equal(scores, [[1, 1, 5], [2, np.nan, np.nan]])
    assert scores.dtype == np.float32


def test_async_functions_run_together_also_where_a_loop_is_running():
    """Each waits until the other has begun; one is an object; the event loop is the same at every call."""
    begun, loops = [], []

    async def first(completions):
        begun.append("first")
        loops.append(asyncio.get_running_loop())
        while "Second" not in begun:
            await asyncio.sleep(0)
        return ones(completions)

    class Second:
        async def __call__(self, completions):
            begun.append("Second")
            while "first" not in begun:
                await asyncio.sleep(0)
            return [2.0, None]

    async def a_notebook_cell():
        functions = RewardFunctions([first, ones, Second()])
        for _ in range(2):
            scores = functions.score({"completions": ["a", "b"]}, 2)
            np.testing.assert_array_equal(scores, [[1, 1, 2], [1, 1, np.nan]])

    asyncio.run(a_notebook_cell())
    assert loops[0] is loops[1]


def test_where_one_async_function_fails_the_others_stop():
    stopped = []

    async def patient(completions):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            stopped.append("patient")
            raise

    with pytest.raises(RewardError, match="fails_later"):
        RewardFunctions([patient, fails_later]).score({"completions": ["a"]}, 1)
    for _ in range(100):  # it is told so in its own thread
        if stopped:
            break
        time.sleep(0.01)
    assert stopped == ["patient"]


@pytest.mark.parametrize(
    "say",
    [
        lambda logged: logged.metric("loss", 1.0),
        lambda logged: logged.metric("rewards/mine/mean", 1.0),
        lambda logged: logged.metric("mine", float("nan")),
        lambda logged: logged.extra("prompt", ["a"]),
        lambda logged: logged.extra("rewards/mine", ["a"]),
    ],
)
def test_what_reward_functions_may_not_log(say):
    with pytest.raises(RewardError, match="log_"):
        say(Logged(1))


def test_a_column_that_is_not_one_value_for_each_completion():
    def wrong(completions, log_extra):
        log_extra("note", ["only one"])
        return ones(completions)

    with pytest.raises(RewardError, match=r"log_extra\('note', ...\) was given 1 values for 8"):
        RewardFunctions(wrong).score({"completions": ["a"] * 8, "log_extra": Logged(8).extra}, 8)


def test_prompts_longer_than_the_limit_keep_their_end_and_say_so(caplog):
    tokenizer = models.tokenizer()
    rows = [{"prompt": "the quick brown fox"}, {"prompt": "the"}]
    whole = read_prompts(rows, tokenizer, 100)
    cut = read_prompts(rows, tokenizer, 3)
    assert cut[0].ids == whole[0].ids[-3:] != whole[0].ids
    assert cut[0].prompt == "the quick brown fox"
    assert cut[1].ids == whole[1].ids
    assert caplog.messages == ["1 of 2 prompts are cut to their last 3 tokens"]


def test_prompts_may_be_in_a_file(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the fox", "answer": 4}\n')
    (prompt,) = read_prompts(tmp_path / "prompts.jsonl", models.tokenizer(), 100)
    assert prompt.prompt == "the fox" and prompt.columns == {"answer": 4}


def test_a_prompt_that_ends_with_the_assistant_is_continued():
    tokenizer = models.fresh_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    rows = [{"prompt": turns[:1]}, {"prompt": turns}]
    texts = [tokenizer.decode(prompt.ids) for prompt in read_prompts(rows, tokenizer, 100)]
    assert texts == ["<user>the fox</><assistant>", "<user>the fox</><assistant>jumps"]


def test_steps_are_equally_large_and_go_on_into_the_next_epoch():
    prompts = read_prompts([{"prompt": f"the fox {i}"} for i in range(5)], models.tokenizer(), 100)
    stream = steps(prompts, 2, seed=0)
    seen = [prompt.prompt for _ in range(5) for prompt in next(stream)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == [prompt.prompt for prompt in prompts]
    assert seen[:5] != seen[5:]
    other = steps(prompts, 2, seed=1)
    assert [prompt.prompt for _ in range(5) for prompt in next(other)] != seen
