"""SFTTrainer and its settings: each field of SFTConfig changes the result that it says it changes."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from jaxtune import LanguageModel, SFTConfig, SFTTrainer, get_chat_template, train_on_responses_only
from jaxtune.data import formats
from jaxtune.errors import OptionError
from jaxtune.training import loop, running
from jaxtune.training.optimizers import averaged
from jaxtune.training.trainer import optimizer_of
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 128, 6 + 3 * i).tolist()} for i in range(8)]
BASE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer())


def train(model, rows=ROWS, **settings):
    """A run on a copy of the model, and its log."""
    trainer = SFTTrainer(dataclasses.replace(model), SFTConfig(**{**BASE, **settings}), train_dataset=rows)
    trainer.train()
    return trainer, trainer.log_history


@pytest.fixture(scope="module")
def baseline(model):
    return train(model)


def column(log, name):
    return [record[name] for record in log]


def test_the_same_settings_give_the_same_run_to_the_bit(model, baseline):
    again, log = train(model)
    assert column(log, "loss") == column(baseline[1], "loss")
    assert_trees_equal(again.model.lora, baseline[0].model.lora)


def test_training_changes_the_adapter_and_nothing_else(model, baseline):
    trained = baseline[0].model
    assert trained.params is model.params
    moved = [
        not np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (trained.lora, model.lora)), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 2e-2},
        {"loraplus_lr_ratio": 16.0},
        {"lr_scheduler_type": "constant"},
        {"warmup_steps": 2},
        {"warmup_steps": 0},
        {"warmup_steps": 0.5},
        {"warmup_ratio": 0.0},
        {"weight_decay": 0.9},
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.5},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2},  # Adam alone does not see the scale of a gradient
        {"seed": 1},
        {"per_device_train_batch_size": 1},
        {"gradient_accumulation_steps": 1},
        {"max_length": 8},
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.2},
        {"z_loss_weight": 0.1},
        {"neftune_noise_alpha": 5.0},
        *({"optim": name} for name in ("lion_8bit", "lion_32bit", "adafactor", "muon")),
        *({"optim": name} for name in ("rmsprop", "schedule_free_adamw", "sgd")),
    ],
    ids=str,
)
def test_a_setting_changes_the_losses(model, baseline, settings):
    reference = baseline
    if len(settings) > 1:
        reference = train(model, adam_epsilon=1e-2)
    _, log = train(model, **settings)
    assert not np.allclose(column(log, "loss"), column(reference[1], "loss"), rtol=1e-6)


def test_epochs_and_steps(model, baseline):
    _, log = train(model, max_steps=-1, num_train_epochs=1)
    assert column(log, "step") == [1, 2]
    assert column(log, "epoch") == [0.5, 1.0]
    assert column(baseline[1], "step") == [1, 2, 3]


def test_logging_steps_average_the_loss(model, baseline):
    _, log = train(model, logging_steps=2)
    losses = column(baseline[1], "loss")
    assert column(log, "step") == [2, 3]
    np.testing.assert_allclose(column(log, "loss"), [np.mean(losses[:2]), losses[2]], rtol=1e-6)


def test_what_train_returns(model):
    trainer = SFTTrainer(dataclasses.replace(model), SFTConfig(**BASE), train_dataset=ROWS)
    result = trainer.train()
    assert result.global_step == 3
    np.testing.assert_allclose(result.training_loss, np.mean(column(trainer.log_history, "loss")))
    assert {
        "train_runtime",
        "train_samples_per_second",
        "train_steps_per_second",
        "train_loss",
        "epoch",
    } == set(result.metrics)


def test_the_device_holds_one_adapter_while_it_is_trained(model, monkeypatch):
    held = []

    def watched(*args, **more):
        held.append(copy.lora)
        return loop.run(*args, **more)

    monkeypatch.setattr(running, "run", watched)
    copy = dataclasses.replace(model)
    SFTTrainer(copy, SFTConfig(**BASE), train_dataset=ROWS).train()
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(held))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(copy.lora))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.lora)), "what someone else holds stays"


def test_an_interrupt_keeps_what_was_learnt(model, caplog):
    """Ctrl-C after the second step's line: the adapter is that of the last step that was dispatched."""
    trainer = SFTTrainer(dataclasses.replace(model), SFTConfig(**BASE), train_dataset=ROWS)

    class Interrupt(logging.Handler):
        def emit(self, record):
            if "step 2/" in record.getMessage():
                raise KeyboardInterrupt

    handler = Interrupt()
    logging.getLogger("jaxtune").addHandler(handler)
    try:
        with caplog.at_level("INFO", "jaxtune"), pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        logging.getLogger("jaxtune").removeHandler(handler)
    assert [record["step"] for record in trainer.log_history] == [1, 2]
    before, after = (jax.tree.leaves(tree) for tree in (model.lora, trainer.model.lora))
    assert all(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_output_dir_has_the_settings_and_a_line_a_step(model, tmp_path):
    _, log = train(model, output_dir=tmp_path / "run")
    first, *lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert first["settings"]["learning_rate"] == 1e-2
    assert lines == log


def test_the_head_may_have_a_rate_of_its_own(model):
    """At 0 it stays, as everything else moves."""
    config = dataclasses.replace(model.causal_lm.lora_config, modules_to_save=("lm_head",))
    causal_lm = dataclasses.replace(model.causal_lm, lora_config=config)
    lora = {**model.lora, "lm_head": {"weight": model.params["lm_head"]["weight"].astype("float32")}}
    own = dataclasses.replace(model, causal_lm=causal_lm, lora=lora)
    trained, _ = train(own, embedding_learning_rate=0.0)
    for part, moves in (("lm_head", False), ("layers", True)):
        before, after = (jax.tree.leaves(tree[part]) for tree in (lora, trained.model.lora))
        assert [not np.array_equal(*pair) for pair in zip(before, after, strict=True)] == [moves] * len(
            before
        )


def test_a_rate_of_what_is_not_trained(model):
    with pytest.raises(OptionError, match="neither the embedding nor the head is trained"):
        train(model, embedding_learning_rate=1e-3)
    with pytest.raises(OptionError, match="no B of an adapter"):
        optimizer_of(SFTConfig(loraplus_lr_ratio=2.0), 10)[0].init(model.causal_lm.skeleton)


@pytest.mark.parametrize("full_finetuning", [False, True])
def test_schedule_free_learning_leaves_the_average(model, full_finetuning, monkeypatch):
    states = []

    def watched(step, state, frozen, stream, on_record, on_state, *more):
        noted = lambda s: (states.append(s), on_state(s))
        return loop.run(step, state, frozen, stream, on_record, noted, *more)

    monkeypatch.setattr(running, "run", watched)
    settings = {}
    if full_finetuning:
        params = jax.tree.map(lambda spec: np.full(spec.shape, 0.02, "float32"), model.causal_lm.skeleton)
        settings = dict(params=params, lora=None, full_finetuning=True)
    own = dataclasses.replace(model, **settings)
    SFTTrainer(own, SFTConfig(**BASE, optim="schedule_free_adamw"), train_dataset=ROWS).train()
    final = states[-1]
    left = own.params if full_finetuning else own.lora
    assert_trees_equal(left, averaged(final.trained, final.optimizer))
    moved = [
        not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (left, final.trained)), strict=True)
    ]
    assert all(moved)


def test_gradient_checkpointing_keeps_the_result(model, baseline):
    for value in (False, "attention"):
        _, log = train(model, gradient_checkpointing=value)
        np.testing.assert_allclose(column(log, "loss"), column(baseline[1], "loss"), rtol=1e-5)


def trained_text(trainer):
    """What is trained on, decoded, a string for each sample."""
    samples = trainer.samples
    return [trainer.processing_class.decode(s.input_ids[s.labels != -100]) for s in samples]


CHAT = [
    {
        "messages": [
            {"role": "user", "content": "the fox"},
            {"role": "assistant", "content": "jumps"},
            {"role": "user", "content": "the dog"},
            {"role": "assistant", "content": "is lazy"},
        ]
    }
]


def test_which_tokens_are_trained_on(model):
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml")

    def text(rows, **settings):
        return trained_text(SFTTrainer(model, SFTConfig(**settings), train_dataset=rows, tokenizer=tokenizer))

    whole = text(CHAT)
    assert "the fox" in whole[0]
    assert text(CHAT, assistant_only_loss=True) == ["jumps<|im_end|>is lazy<|im_end|>"]
    masked = train_on_responses_only(SFTTrainer(model, SFTConfig(), train_dataset=CHAT, tokenizer=tokenizer))
    assert trained_text(masked)[0].replace("\n", "") == "jumps<|im_end|>is lazy<|im_end|>"

    pair = [{"prompt": "the fox", "completion": " jumps"}]
    assert text(pair) == [" jumps<|im_end|>"]
    assert text(pair, completion_only_loss=False)[0].endswith("the fox jumps<|im_end|>")
    assert text([{"body": "the fox"}], dataset_text_field="body")[0].endswith("the fox<|im_end|>")


def test_rows_of_ids_need_no_tokenizer(model, baseline):
    trainer, log = train(dataclasses.replace(model, tokenizer=None))
    assert trainer.processing_class is None
    assert column(log, "loss") == column(baseline[1], "loss")


def test_a_preview_of_a_file_s_rows(model, tmp_path, capsys):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(CHAT[0]) + "\n" + json.dumps({"messages": CHAT[0]["messages"][:2]}) + "\n")
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml")
    trainer = SFTTrainer(model, SFTConfig(), train_dataset=str(path), tokenizer=tokenizer)
    train_on_responses_only(trainer).preview(1)
    shown = capsys.readouterr().out.replace("¦", "")
    assert "the fox<|im_end|>" in shown and "⟦jumps<|im_end|>" in shown and "lazy" not in shown
    with pytest.raises(OptionError, match="no sample 2"):
        trainer.preview(2)


def test_tokens_are_kept_in_the_user_s_cache_unless_told_otherwise(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(formats, "CHUNK_ROWS", 1)
    rows = [{"text": "the fox"}]
    SFTTrainer(model, SFTConfig(cache_tokens=False), train_dataset=rows)
    assert not list(tmp_path.iterdir())
    first, second = (SFTTrainer(model, SFTConfig(), train_dataset=rows).samples for _ in range(2))
    assert len(list(tmp_path.glob("jaxtune/tokens/*.npz"))) == 1
    assert first[0].input_ids.tolist() == second[0].input_ids.tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss_type": "dtf"}, "'dft'"),
        ({"label_smoothing_factor": 1.0}, "from 0 to below 1"),
        ({"label_smoothing_factor": 0.1, "loss_type": "dft"}, "0 with loss_type='dft'"),
        ({"z_loss_weight": 0.1, "loss_type": "dft"}, "0 with loss_type='dft'"),
        ({"z_loss_weight": -1e-4}, "at least 0"),
        (
            {"embedding_learning_rate": 1e-4, "learning_rate": 0.0},
            "more than 0 beside an embedding_learning_rate",
        ),
        ({"neftune_noise_alpha": -5}, "at least 0"),
        ({"loraplus_lr_ratio": -1.0}, "at least 0"),
        ({"optim": "schedule_free_adamw", "adam_beta1": 0.0}, "more than 0 for schedule_free_adamw"),
    ],
    ids=str,
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(OptionError, match=words):
        SFTConfig(**settings)


def test_names_without_effect_are_accepted_with_one_line(caplog):
    with caplog.at_level("INFO", "jaxtune"):
        SFTConfig(bf16=True, report_to="none", dataset_num_proc=2, packing=False)
    assert [record.getMessage() for record in caplog.records] == [
        "SFTConfig: bf16 has no effect in jaxtune.",
        "SFTConfig: dataset_num_proc has no effect in jaxtune.",
    ]
