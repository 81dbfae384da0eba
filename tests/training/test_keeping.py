"""A run that is evaluated, saved, stopped and resumed: what it leaves is what an undisturbed run leaves, to the bit."""

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal

import jax
import numpy as np
import pytest
import transformers
from safetensors.numpy import load_file

from jaxtune import EarlyStoppingCallback, LanguageModel, SFTConfig, SFTTrainer, TrainerCallback
from jaxtune.errors import CheckpointError, DivergenceError, OptionError, OutputFolderError
from jaxtune.training import checkpoints
from jaxtune.training.keeping_config import KeepingConfig
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 128, 20).tolist()} for i in range(8)]
EVAL = [{"input_ids": np.random.default_rng(100 + i).integers(0, 128, 20).tolist()} for i in range(3)]
BASE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=6, learning_rate=1e-2)
TIMES = {
    "step_time_sec",
    "tokens_per_second",
    "compile_seconds",
    "eval_runtime",
    "eval_samples_per_second",
    "eval_steps_per_second",
}


@pytest.fixture(scope="module")
def model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(
        causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer(), name_or_path="base"
    )


def trainer_of(model, folder=None, callbacks=None, eval_dataset=None, **settings):
    config = SFTConfig(**{**BASE, "output_dir": folder, **settings})
    return SFTTrainer(
        dataclasses.replace(model), config, train_dataset=ROWS, eval_dataset=eval_dataset, callbacks=callbacks
    )


def trained(model, folder=None, resume=None, **more):
    trainer = trainer_of(model, folder, **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def numbers(log):
    """A log without what depends on the clock."""
    return [{name: value for name, value in record.items() if name not in TIMES} for record in log]


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """Six steps, saved after the second, the fourth and the last; evaluated with them."""
    folder = tmp_path_factory.mktemp("run")
    return trained(
        model, folder, save_steps=2, eval_strategy="steps", eval_steps=2, eval_dataset=EVAL
    ), folder


class Asks(TrainerCallback):
    """Does something at one step's end."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            self.action(control)


class TestEvaluation:
    def test_the_training_set_has_the_training_loss(self, model):
        settings = dict(
            max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=0.0
        )
        trainer = trained(model, **settings)
        for batch_size in (1, 3, 8):
            trainer.args = dataclasses.replace(trainer.args, per_device_eval_batch_size=batch_size)
            metrics = trainer.evaluate(ROWS)
            assert abs(metrics["eval_loss"] - trainer.log_history[0]["loss"]) < 1e-5
        assert {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"} < set(metrics)

    @pytest.mark.parametrize(
        ("settings", "at"),
        [
            ({"eval_strategy": "steps", "eval_steps": 4}, [4, 6]),
            ({"eval_strategy": "steps", "eval_steps": 0.5}, [3, 6]),
            ({"eval_strategy": "steps", "logging_steps": 2}, [2, 4, 6]),
            ({"eval_strategy": "epoch"}, [2, 4, 6]),
            ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 2, 4, 6]),
            ({"eval_on_start": True}, [0]),
            ({}, []),
        ],
    )
    def test_when(self, model, settings, at):
        trainer = trained(model, eval_dataset=EVAL, **settings)
        assert [record["step"] for record in trainer.log_history if "eval_loss" in record] == at

    def test_it_changes_nothing_and_sees_the_newest_weights(self, model, undisturbed):
        log = undisturbed[0].log_history
        plain = trained(model)
        losses = [record["loss"] for record in log if "loss" in record]
        assert losses == [record["loss"] for record in plain.log_history]
        at_the_end = [record["eval_loss"] for record in log if "eval_loss" in record][-1]
        assert at_the_end == undisturbed[0].evaluate()["eval_loss"]

    def test_several_datasets_have_their_names(self, model):
        trainer = trained(model, eval_dataset={"a": EVAL, "b": ROWS}, eval_strategy="epoch", max_steps=2)
        last = trainer.log_history[-1]
        assert {"eval_a_loss", "eval_b_loss"} < set(last)
        assert last["eval_b_loss"] == trainer.evaluate(ROWS)["eval_loss"]

    def test_without_a_dataset(self, model):
        with pytest.raises(OptionError, match="eval_strategy='epoch', and there is no eval_dataset"):
            trainer_of(model, eval_strategy="epoch")
        with pytest.raises(OptionError, match="without an eval_dataset"):
            trainer_of(model).evaluate()


class TestCheckpoints:
    def test_one_has_all_that_others_and_we_need(self, undisturbed):
        trainer, folder = undisturbed
        assert saved(folder) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        newest = folder / "checkpoint-6"
        assert {
            "adapter_config.json",
            "adapter_model.safetensors",
            "tokenizer.json",
            "trainer_state.json",
        } <= {path.name for path in newest.iterdir()}
        trainer.model.save_pretrained(folder / "end")
        assert_trees_equal(
            *(load_file(path / "adapter_model.safetensors") for path in (newest, folder / "end"))
        )
        run = json.loads((newest / "trainer_state.json").read_text())
        assert run["global_step"] == 6 and run["log_history"] == trainer.log_history

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ({}, [6]),
            ({"save_strategy": "no"}, []),
            ({"save_strategy": "epoch"}, [2, 4, 6]),
            ({"save_steps": 4}, [4, 6]),
            ({"save_steps": 0.5}, [3, 6]),
            ({"save_strategy": "epoch", "save_total_limit": 2}, [4, 6]),
        ],
    )
    def test_when_and_how_many(self, model, tmp_path, settings, names):
        trained(model, tmp_path / "run", **settings)
        assert saved(tmp_path / "run") == [f"checkpoint-{step}" for step in names]

    @pytest.mark.parametrize("resume", [True, "checkpoint-2"])
    def test_a_resumed_run_repeats_the_undisturbed_one(self, model, undisturbed, tmp_path, resume):
        expected, source = undisturbed
        folder = tmp_path / "run"
        shutil.copytree(source, folder)
        shutil.rmtree(folder / "checkpoint-6")
        resume = resume if resume is True else folder / resume
        again = trained(
            model, folder, resume, save_steps=2, eval_strategy="steps", eval_steps=2, eval_dataset=EVAL
        )
        assert numbers(again.log_history) == numbers(expected.log_history)
        assert_trees_equal(again.model.lora, expected.model.lora)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()[1:]]
        assert numbers(lines) == numbers(expected.log_history)
        assert again.state.global_step == 6

    def test_between_two_lines_of_the_log(self, model, tmp_path):
        settings = dict(logging_steps=4, save_steps=3)
        whole = trained(model, tmp_path / "run", **settings)
        again = trained(model, tmp_path / "run", tmp_path / "run" / "checkpoint-3", **settings)
        assert numbers(again.log_history) == numbers(whole.log_history)

    def test_whole_weights_too(self, tmp_path):
        causal_lm = dataclasses.replace(
            tiny.model(windows=(None,), vocab_size=models.VOCAB), lora_config=None
        )
        rng = np.random.default_rng(0)

        def fresh():
            params = jax.tree.map(lambda x: jax.numpy.asarray(x, "bfloat16"), weights)
            return LanguageModel(causal_lm, params, None, models.tokenizer(), full_finetuning=True)

        weights = jax.tree.map(lambda spec: rng.normal(0, 0.05, spec.shape), causal_lm.skeleton)
        whole = trained(fresh(), tmp_path / "run", save_steps=3)
        again = trained(fresh(), tmp_path / "run", tmp_path / "run" / "checkpoint-3", save_steps=3)
        assert numbers(again.log_history) == numbers(whole.log_history)
        assert_trees_equal(again.model.params, whole.model.params)

    def test_packed_rows_too(self, model, tmp_path):
        settings = dict(packing=True, max_length=45, per_device_train_batch_size=1, save_steps=3)
        whole = trained(model, tmp_path / "run", **settings)
        again = trained(model, tmp_path / "run", tmp_path / "run" / "checkpoint-3", **settings)
        assert numbers(again.log_history) == numbers(whole.log_history)
        assert_trees_equal(again.model.lora, whole.model.lora)
        assert whole.log_history[0]["packing_efficiency"] == 80 / 128

    def test_the_model_alone(self, model, undisturbed, tmp_path):
        """Is what other checkpoints are but for their state, and no run goes on from it."""
        trained(model, tmp_path / "run", save_only_model=True, save_steps=2)
        assert saved(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
        for name in saved(tmp_path / "run"):
            ours, whole = tmp_path / "run" / name, undisturbed[1] / name
            assert {path.name for path in whole.iterdir()} - {path.name for path in ours.iterdir()} == {
                "state"
            }
            assert_trees_equal(*(load_file(path / "adapter_model.safetensors") for path in (ours, whole)))
        with pytest.raises(CheckpointError, match=r"(?s)checkpoint-6 holds no state: .*from_pretrained"):
            trained(model, tmp_path / "run", True, max_steps=8)

    def test_the_newest_is_the_one_saved_last(self, model, tmp_path):
        """Not the one with the highest number, which may be of an earlier run."""
        trained(model, tmp_path / "run")
        trained(model, tmp_path / "run", max_steps=3)
        assert saved(tmp_path / "run") == ["checkpoint-3", "checkpoint-6"]
        assert checkpoints.find(True, tmp_path / "run").name == "checkpoint-3"

    def test_a_full_disk_leaves_none_and_what_was_learnt(self, model, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoints, "_write_state", full)
        trainer = trainer_of(model, tmp_path / "run", save_steps=2)
        with pytest.raises(OutputFolderError, match=r"checkpoint-2 failed: No space left"):
            trainer.train()
        assert not list((tmp_path / "run").glob("*checkpoint*"))
        assert trainer.state.global_step == 4, "it is noticed when the next one is to be saved"
        moved = zip(*map(jax.tree.leaves, (trainer.model.lora, model.lora)), strict=True)
        assert all(not np.array_equal(a, b) for a, b in moved)

    def test_what_a_killed_run_left_half_written_goes(self, model, tmp_path):
        left_over = tmp_path / "run" / ".checkpoint-2.abc.partial"
        left_over.mkdir(parents=True)
        (tmp_path / "run" / "metrics.jsonl").touch()
        trained(model, tmp_path / "run")
        assert not left_over.exists()

    def test_sigterm_saves_and_ends_as_terminated(self, model, undisturbed, tmp_path):
        terminate = Asks(3, lambda control: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            trained(model, tmp_path / "run", callbacks=[terminate])
        assert ended.value.code == 128 + signal.SIGTERM
        assert saved(tmp_path / "run") == ["checkpoint-3"]
        again = trained(model, tmp_path / "run", True)
        assert_trees_equal(again.model.lora, undisturbed[0].model.lora)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_the_first_ctrl_c_saves_and_ends(self, model, undisturbed, tmp_path):
        interrupt = Asks(3, lambda control: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trained(model, tmp_path / "run", callbacks=[interrupt])
        assert saved(tmp_path / "run") == ["checkpoint-3"]
        again = trained(model, tmp_path / "run", True)
        assert_trees_equal(again.model.lora, undisturbed[0].model.lora)

    def test_the_second_ctrl_c_ends_at_once(self, model, tmp_path):
        def twice(control):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

        trainer = trainer_of(model, tmp_path / "run", callbacks=[Asks(3, twice)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert not saved(tmp_path / "run") and trainer.state.global_step == 3
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler

    def test_where_nothing_is_saved_one_ctrl_c_ends_at_once(self, model, tmp_path):
        seen = []
        asks = [Asks(3, lambda control: os.kill(os.getpid(), signal.SIGINT)), Asks(3, seen.append)]
        with pytest.raises(KeyboardInterrupt):
            trained(model, tmp_path / "run", callbacks=asks, save_strategy="no")
        assert not seen

    def test_a_loss_that_is_not_finite_names_samples_and_checkpoint(self, model, tmp_path):
        spoil = Asks(2, lambda control: trainer.model.params["norm"].update(weight=np.nan * norm))
        trainer = trainer_of(model, tmp_path / "run", callbacks=[spoil], save_steps=2)
        trainer.model.params = {**model.params, "norm": dict(model.params["norm"])}
        norm = model.params["norm"]["weight"]
        with pytest.raises(DivergenceError) as caught:
            trainer.train()
        first = next(trainer.batches())[1].sample_ids
        assert sorted(first) != sorted(range(8))
        assert "At step 3 the loss is nan" in caught.value.found
        samples = caught.value.found.rpartition("samples are ")[2].rstrip(".").split(", ")
        assert len(samples) == 4 and set(map(int, samples)) <= set(range(8))
        assert f"{tmp_path / 'run' / 'checkpoint-2'}" in caught.value.fix


class TestWhatCannotBeResumed:
    def resume(self, model, folder, resume, **settings):
        with pytest.raises(CheckpointError) as caught:
            trained(model, folder, resume, **settings)
        return str(caught.value)

    def test_nothing_there(self, model, tmp_path):
        assert "holds no checkpoint" in self.resume(model, tmp_path / "run", True)
        assert "there is no output_dir" in self.resume(model, None, True)

    def test_no_checkpoint(self, model, undisturbed):
        said = self.resume(model, None, undisturbed[1] / "checkpoint-5")
        assert "which is no checkpoint" in said and "Did you mean 'checkpoint-" in said

    def test_another_model(self, model, undisturbed):
        other = dataclasses.replace(
            model.causal_lm, lora_config=dataclasses.replace(model.causal_lm.lora_config, lora_alpha=3)
        )
        said = self.resume(dataclasses.replace(model, causal_lm=other), None, undisturbed[1] / "checkpoint-2")
        assert "of another model, or of an adapter with other settings" in said

    def test_another_dataset(self, model, undisturbed):
        trainer = trainer_of(model)
        trainer.samples = trainer.samples[:5]
        with pytest.raises(Exception, match="num_samples=8, and now it is 5"):
            trainer.train(undisturbed[1] / "checkpoint-2")

    def test_the_same_samples_packed(self, model, undisturbed):
        with pytest.raises(Exception, match="num_samples=8, and now it is 4") as caught:
            trained(model, None, undisturbed[1] / "checkpoint-2", packing=True, max_length=45)
        assert "packing" in caught.value.expected

    def test_other_samples(self, model, undisturbed):
        trainer = trainer_of(model)
        trainer.samples[0].labels[:5] = -100
        with pytest.raises(CheckpointError, match="over other samples, or with other tokens trained on"):
            trainer.train(undisturbed[1] / "checkpoint-2")

    def test_another_optimizer(self, model, undisturbed):
        said = self.resume(model, None, undisturbed[1] / "checkpoint-2", optim="adamw_torch")
        assert "was saved with optim='adamw_8bit', and now it is 'adamw_torch'" in said

    @pytest.mark.parametrize("content", ["", "{", "{}"])
    def test_a_file_that_was_cut(self, model, undisturbed, tmp_path, content):
        shutil.copytree(undisturbed[1] / "checkpoint-2", tmp_path / "checkpoint-2")
        (tmp_path / "checkpoint-2" / "trainer_state.json").write_text(content)
        assert "cannot be read" in self.resume(model, None, tmp_path / "checkpoint-2")

    def test_a_state_that_was_lost(self, model, undisturbed, tmp_path):
        shutil.copytree(undisturbed[1] / "checkpoint-2", tmp_path / "checkpoint-2")
        shutil.rmtree(tmp_path / "checkpoint-2" / "state")
        assert "holds no state: it was saved with" in self.resume(model, None, tmp_path / "checkpoint-2")

    def test_a_state_that_was_spoilt(self, model, undisturbed, tmp_path):
        copy = shutil.copytree(undisturbed[1] / "checkpoint-2", tmp_path / "checkpoint-2")
        shutil.rmtree(copy / "state")
        (copy / "state").mkdir()
        assert "does not hold this run's state" in self.resume(model, None, copy)


def test_other_settings_are_said(model, undisturbed, caplog):
    trained(
        model, None, undisturbed[1] / "checkpoint-4", learning_rate=1e-3, loss_type="dft", eval_on_start=True
    )
    assert "learning_rate=0.01, and now it is 0.001" in caplog.text
    assert "loss_type='nll', and now it is 'dft'" in caplog.text
    assert caplog.text.count("the run goes on differently") == 2


@pytest.mark.parametrize("steps", [6, 4])
def test_a_run_that_is_done_is_left_as_it_is(model, undisturbed, caplog, steps):
    """What a scheduler starts again need not fail."""
    again = trained(model, None, undisturbed[1] / "checkpoint-6", max_steps=steps)
    assert f"the run's {steps} steps are done" in caplog.text
    assert_trees_equal(again.model.lora, undisturbed[0].model.lora)


def test_nothing_is_printed_twice(undisturbed):
    assert not any(type(handler) is logging.StreamHandler for handler in logging.root.handlers)


def test_checkpoints_alone_are_a_run_s_folder(model, undisturbed, tmp_path, caplog):
    shutil.copytree(undisturbed[1] / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    caplog.set_level("INFO", "jaxtune")
    again = trained(model, tmp_path / "run", True)
    assert_trees_equal(again.model.lora, undisturbed[0].model.lora)
    assert "is replaced" not in caplog.text


def test_save_model_is_the_model_s(model, undisturbed, tmp_path):
    trainer, folder = undisturbed
    trainer.save_model(tmp_path / "saved")
    same = (
        folder / "checkpoint-6" / "adapter_model.safetensors",
        tmp_path / "saved" / "adapter_model.safetensors",
    )
    assert_trees_equal(*map(load_file, same))
    with pytest.raises(OptionError, match="without an output_dir"):
        trainer_of(model).save_model()


class TestCallbacks:
    def test_every_hook_has_its_moment(self, model, tmp_path):
        seen = []

        class Watches:
            def __getattr__(self, hook):
                if not hook.startswith("on_"):
                    raise AttributeError(hook)
                return lambda args, state, control, **more: seen.append(
                    (hook, state.global_step, sorted(more))
                )

        trained(
            model, tmp_path, callbacks=[Watches()], max_steps=2, eval_strategy="epoch", save_strategy="epoch",
            eval_dataset=EVAL,
        )  # fmt: skip
        always = ["model", "processing_class"]
        assert seen == [
            ("on_train_begin", 0, always), ("on_epoch_begin", 0, always), ("on_step_begin", 0, always),
            ("on_step_end", 1, always), ("on_step_begin", 1, always),
            ("on_log", 1, ["logs", *always]),
            ("on_step_end", 2, always), ("on_epoch_end", 2, always),
            ("on_log", 2, ["logs", *always]),
            ("on_log", 2, ["logs", *always]), ("on_evaluate", 2, ["metrics", *always]), ("on_save", 2, always),
            ("on_train_end", 2, always),
        ]  # fmt: skip

    def test_what_one_asks_for_is_done(self, model, tmp_path):
        asks = [
            Asks(1, lambda control: setattr(control, "should_evaluate", True)),
            Asks(3, lambda control: setattr(control, "should_save", True)),
            Asks(4, lambda control: setattr(control, "should_training_stop", True)),
        ]
        trainer = trained(model, tmp_path, callbacks=asks, eval_dataset=EVAL, logging_steps=3)
        assert [record["step"] for record in trainer.log_history if "eval_loss" in record] == [1]
        assert saved(tmp_path) == ["checkpoint-3"]
        assert [record["step"] for record in trainer.log_history if "loss" in record] == [3, 4]
        assert trainer.state.global_step == 4

    @pytest.mark.parametrize("kind", [EarlyStoppingCallback, transformers.EarlyStoppingCallback])
    @pytest.mark.parametrize(("threshold", "stops_at"), [(0.0, 6), (100.0, 3)])
    def test_early_stopping(self, model, tmp_path, kind, threshold, stops_at):
        stopping = kind(early_stopping_patience=2, early_stopping_threshold=threshold)
        trainer = trained(
            model, tmp_path, callbacks=[stopping], eval_dataset=ROWS, eval_strategy="steps", eval_steps=1,
            save_steps=1, load_best_model_at_end=True, learning_rate=1e-3,
        )  # fmt: skip
        assert trainer.state.global_step == stops_at

    def test_something_without_hooks_is_refused(self, model):
        with pytest.raises(OptionError, match="none of a callback's hooks"):
            trainer_of(model, callbacks=[object()])
        with pytest.raises(OptionError, match="a run that is never evaluated"):
            trained(model, callbacks=EarlyStoppingCallback())

    def test_one_may_come_later(self, model):
        trainer = trainer_of(model)
        trainer.add_callback(Asks(2, lambda control: setattr(control, "should_training_stop", True)))
        trainer.train()
        assert trainer.state.global_step == 2


UNSEEN = [{"input_ids": row} for row in np.random.default_rng(200).integers(128, 256, (3, 20)).tolist()]
WORSE = dict(
    learning_rate=0.05, lr_scheduler_type="constant", eval_strategy="steps", eval_steps=1, max_steps=5,
    eval_dataset=UNSEEN,
)  # fmt: skip
"""The more is learnt of other tokens, the less likely are these."""


class TestTheBest:
    def test_is_left_in_the_model(self, model, tmp_path):
        trainer = trained(
            model, tmp_path, save_steps=1, save_total_limit=1, load_best_model_at_end=True, **WORSE,
        )  # fmt: skip
        losses = {
            record["step"]: record["eval_loss"] for record in trainer.log_history if "eval_loss" in record
        }
        best = min(losses, key=losses.get)
        assert best < 5, "the last is not the best, or this shows nothing"
        assert trainer.state.best_global_step == best and trainer.state.best_metric == losses[best]
        assert trainer.evaluate()["eval_loss"] == losses[best]
        assert saved(tmp_path) == sorted({f"checkpoint-{int(best)}", "checkpoint-5"}), "and it is not pruned"

    def test_greater_may_be_better(self, model, tmp_path):
        trainer = trained(
            model, tmp_path, save_strategy="best", metric_for_best_model="eval_loss", greater_is_better=True,
            **WORSE,
        )  # fmt: skip
        losses = [record["eval_loss"] for record in trainer.log_history if "eval_loss" in record]
        assert trainer.state.best_metric == max(losses)
        records = [
            n for n, loss in enumerate(losses, start=1) if all(loss > each for each in losses[: n - 1])
        ]
        assert saved(tmp_path) == [f"checkpoint-{step}" for step in records]

    def test_a_metric_that_there_is_not_is_noticed_before_the_first_step(self, model):
        trainer = trainer_of(model, eval_dataset=EVAL, eval_strategy="epoch", metric_for_best_model="acuracy")
        with pytest.raises(OptionError, match=r"metric_for_best_model='acuracy'.*\n.*eval_loss"):
            trainer.train()
        assert trainer.log_history == []
        assert_trees_equal(trainer.model.lora, model.lora)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(trainer.model.lora))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"eval_strategy": "never"}, "eval_strategy='never'"),
        ({"save_strategy": "step"}, "Did you mean 'steps'"),
        ({"save_steps": 0}, "save_steps=0"),
        ({"save_steps": 1.5}, "save_steps=1.5"),
        ({"eval_steps": -1}, "eval_steps=-1"),
        ({"save_total_limit": 0}, "save_total_limit=0"),
        ({"load_best_model_at_end": True}, "output_dir=None"),
        ({"load_best_model_at_end": True, "output_dir": "x"}, "eval_strategy='no'"),
        ({"load_best_model_at_end": True, "output_dir": "x", "eval_strategy": "epoch"}, "save_strategy='steps'"),
        (
            dict(load_best_model_at_end=True, output_dir="x", eval_strategy="steps", eval_steps=3, save_steps=4),
            "multiple of the 3",
        ),
        ({"resume_from_checkpoint": 3}, "resume_from_checkpoint=3"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(OptionError, match=said):
        KeepingConfig(**settings)


def test_names_that_callbacks_of_transformers_look_up():
    config = KeepingConfig(
        load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch", output_dir="x"
    )
    assert (config.metric_for_best_model, config.greater_is_better) == ("loss", False)
    assert KeepingConfig(metric_for_best_model="accuracy").greater_is_better is True
