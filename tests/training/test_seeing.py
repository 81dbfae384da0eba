"""What is seen of a run: its records, its log's lines, the bar, the report, the profile; and how scripts ask for it."""

import dataclasses
import json
import os
import signal
import types

import numpy as np
import pytest
import transformers

from jaxtune import (
    LanguageModel,
    SFTConfig,
    SFTTrainer,
    TrainerCallback,
    get_chat_template,
    train_on_responses_only,
)
from jaxtune.data.parts import response_marker
from jaxtune.errors import DivergenceError, OptionError
from jaxtune.models.flops import useful_flops
from jaxtune.reporting import page
from jaxtune.reporting.trackers import TRACKERS
from jaxtune.training import run_report, speed
from jaxtune.training.seeing_config import SeeingConfig
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

ROWS = [{"input_ids": np.random.default_rng(i).integers(5, 128, 20).tolist()} for i in range(8)]
BASE = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-2, save_strategy="no"
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(
        causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer(), name_or_path="base"
    )


def trainer_of(model, rows=ROWS, callbacks=None, eval_dataset=None, **settings):
    config = SFTConfig(**{**BASE, **settings})
    return SFTTrainer(
        dataclasses.replace(model), config, train_dataset=rows, eval_dataset=eval_dataset, callbacks=callbacks
    )


def trained(model, *args, **settings):
    trainer = trainer_of(model, *args, **settings)
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """A run of four steps, an evaluation after every second, with nothing else asked for."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    return trained(model, output_dir=folder, eval_dataset=ROWS[:2], eval_strategy="epoch"), folder


class At(TrainerCallback):
    """Does something at one step's end."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            self.action(control)


def lines(trainer):
    return [record["step"] for record in trainer.log_history if "loss" in record]


class TestRecords:
    def test_names_and_kinds(self, plain):
        first = plain[0].log_history[0]
        assert set(first) == {
            "step", "epoch", "loss", "grad_norm", "learning_rate", "trained_tokens", "tokens", "num_tokens",
            "packing_efficiency", "step_time_sec", "tokens_per_second", "compile_seconds",
        }  # fmt: skip
        for name in ("step", "tokens", "trained_tokens", "num_tokens"):
            assert type(first[name]) is int, name

    def test_tokens(self, model):
        trainer = trained(model, ROWS[:6], logging_steps=2)  # 4 and 2 samples a step
        first, second = trainer.log_history
        assert (first["tokens"], first["num_tokens"], second["num_tokens"]) == (60.0, 120, 240)
        np.testing.assert_allclose(first["tokens_per_second"], 60 / first["step_time_sec"])

    def test_what_a_gpu_says_too(self, model, monkeypatch):
        gpu = types.SimpleNamespace(
            device_kind="NVIDIA H100 80GB HBM3", memory_stats=lambda: {"peak_bytes_in_use": 12_340_000_000}
        )
        monkeypatch.setattr(speed, "default_device", lambda: gpu)
        record = trained(model, max_steps=1).log_history[0]
        config = model.causal_lm.config
        flops = useful_flops(config, [20] * 4)
        np.testing.assert_allclose(record["mfu"], flops / record["step_time_sec"] / 989e12)
        assert record["peak_device_bytes"] == 12_340_000_000
        assert speed.in_words({**record, "mfu": 0.413})[1:] == ["MFU 41%", "12.3 GB"]

    def test_useful_flops(self):
        """Of Llama-3.1-8B on one row of 2048: 4 x 7.5e9 x 2048, and 3 x 32 layers of 4096 x 2048^2 x 2."""
        config = tiny.model(windows=(None,)).config
        linear = 128 * 32 * (2 * 4 + 2 * 2) + 3 * 128 * 256 + 128 * 128
        assert useful_flops(config, [10, 6]) == 4 * linear * 16 + 3 * 128 * 2 * (100 + 36)
        assert useful_flops(config, [10], full=True) == 6 * linear * 10 + 3 * 128 * 2 * 100
        windowed = tiny.model(windows=(4,)).config
        assert useful_flops(windowed, [10]) == 4 * linear * 10 + 3 * 128 * 2 * (100 - 36)
        assert useful_flops(windowed, [4]) == useful_flops(config, [4])

    @pytest.mark.parametrize(
        ("kind", "peak"),
        [
            ("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
            ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12),
            ("NVIDIA GeForce RTX 4090", 165e12), ("NVIDIA H20", 148e12), ("NVIDIA X1", None), ("cpu", None),
        ],
    )  # fmt: skip
    def test_peaks(self, kind, peak):
        assert speed.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak

    def test_lengths_are_read_off_a_batch(self):
        segments = np.array([[[1, 1, 2, 0], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 2, 2, 3]]])
        assert speed.sample_lengths(segments) == [2, 1, 4, 1, 2, 1]


class TestLines:
    @pytest.mark.parametrize(
        ("settings", "at"),
        [
            ({"logging_steps": 3, "logging_first_step": True}, [1, 3, 4]),
            ({"logging_strategy": "epoch"}, [2, 4]),
            ({"logging_strategy": "no"}, []),
        ],
        ids=str,
    )
    def test_when(self, model, plain, settings, at):
        trainer = trained(model, **settings)
        assert lines(trainer) == at
        assert_trees_equal(trainer.model.lora, plain[0].model.lora)

    @pytest.mark.parametrize("first", [False, True])
    @pytest.mark.parametrize("strategy", ["steps", "epoch"])
    def test_as_transformers_has_it(self, strategy, first):
        """But for the end of a run, where transformers logs the run's own summary."""
        flow = transformers.trainer_callback.DefaultFlowCallback()
        config = SeeingConfig(logging_strategy=strategy, logging_steps=3, logging_first_step=first)
        state = transformers.TrainerState(logging_steps=3, max_steps=12)
        args = types.SimpleNamespace(
            **dataclasses.asdict(config), eval_strategy="no", save_strategy="no", eval_delay=0
        )
        for step in range(1, 12):
            control, epoch = transformers.TrainerControl(), step / 5
            state.global_step = step
            flow.on_step_end(args, state, control)
            if epoch.is_integer():
                flow.on_epoch_end(args, state, control)
            assert config.writes_line(step, 12, epoch) == control.should_log, step
        assert config.writes_line(12, 12, 12 / 5)

    def test_a_line_has_the_mean_since_the_last(self, model, plain):
        each = [record["loss"] for record in plain[0].log_history if "loss" in record]
        log = trained(model, logging_steps=3, logging_first_step=True).log_history
        np.testing.assert_allclose([record["loss"] for record in log], [each[0], np.mean(each[1:3]), each[3]])

    def test_evaluations_are_logged_to_callbacks(self, plain, model):
        seen = []

        class Notes(TrainerCallback):
            def on_log(self, args, state, control, logs, **more):
                seen.append(logs)

        trainer = trained(model, callbacks=[Notes()], eval_dataset=ROWS[:2], eval_strategy="epoch")
        assert seen == trainer.log_history
        assert [record["step"] for record in seen if "eval_loss" in record] == [2, 4]

    @pytest.mark.parametrize(("disable", "shown"), [(True, False), (False, True), (None, False)])
    def test_the_bar(self, model, capfd, disable, shown):
        trained(model, max_steps=2, disable_tqdm=disable)
        said = capfd.readouterr().err
        assert ("2/2" in said.replace("step 2/2", "") and "it/s" in said.replace("step/s", "it/s")) == shown
        if shown:
            last = said.rpartition("\r")[2]
            assert "loss " in last and "tokens/s" in last and "MFU" not in last


class TestReportTo:
    def test_records_go_to_every_tracker_and_to_the_file(self, model, tmp_path, monkeypatch):
        seen = []

        class Notes:
            def __init__(self, name, project, folder):
                seen.append((name, project, folder))

            def begin(self, settings):
                seen.append(settings)

            def log(self, step, record):
                assert step == record["step"]
                seen.append(record)

            def end(self):
                seen.append("end")

        monkeypatch.setattr("jaxtune.reporting.trackers._is_installed", lambda package: True)
        monkeypatch.setitem(TRACKERS, "wandb", Notes)
        Notes.package = "wandb"
        trainer = trained(
            model, output_dir=tmp_path / "run", report_to=["wandb"], run_name="mine", project="ours",
            eval_dataset=ROWS[:2], eval_strategy="epoch",
        )  # fmt: skip
        opened, settings, *records, end = seen
        assert opened[:2] == ("mine", "ours") and opened[2] == tmp_path / "run" / "runs" / "mine"
        assert settings["run_name"] == "mine" and settings["learning_rate"] == 1e-2
        assert records == trainer.log_history and end == "end"
        first, *rest = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        assert first == {"settings": settings} and rest == records

    def test_a_tracker_that_fails_does_not_end_the_run(self, model, monkeypatch, caplog):
        class Down:
            package = "wandb"

            def __init__(self, *_, **__): ...
            def begin(self, settings): ...
            def end(self): ...

            def log(self, step, record):
                raise ConnectionError("no route to host")

        monkeypatch.setattr("jaxtune.reporting.trackers._is_installed", lambda package: True)
        monkeypatch.setitem(TRACKERS, "wandb", Down)
        assert lines(trained(model, report_to="wandb")) == [1, 2, 3, 4]
        assert caplog.text.count("no route to host") == 1

    def test_a_missing_package_is_noticed_before_the_dataset_is_read(self, model, monkeypatch):
        monkeypatch.setattr("jaxtune.reporting.trackers._is_installed", lambda package: False)
        with pytest.raises(OptionError, match=r"jaxtune\[wandb\]"):
            trainer_of(model, rows=[{"nonsense": 1}], report_to="wandb")

    def test_where_tensorboard_writes(self, tmp_path):
        assert SFTConfig(report_to="tensorboard", logging_dir=tmp_path).event_folder == tmp_path
        with pytest.raises(OptionError, match="logging_dir=None"):
            SFTConfig(report_to="tensorboard")


def page_of(folder):
    return (folder / "report.html").read_text()


class TestReport:
    def test_of_a_finished_run(self, plain):
        text = page_of(plain[1])
        for said in (
            "Finished.",
            "<h1>run</h1>",
            "4 of 4",
            "base",
            "eval_loss goes from",
            "packing_efficiency",
        ):
            assert said in text, said
        changed = text.partition("differ from the defaults")[2].partition("</table>")[0]
        assert "learning_rate" in changed and "logging_steps" not in changed
        assert "adapter.r<" in changed and "adapter.bias" in text and "adapter.bias" not in changed
        assert "Before and after" not in text and len(text) < 40_000

    def test_checkpoints_and_a_name(self, model, tmp_path):
        trained(model, output_dir=tmp_path, save_strategy="epoch", run_name="a < b")
        text = page_of(tmp_path)
        assert "checkpoint-2" in text and "checkpoint-4" in text and "<h1>a &lt; b</h1>" in text

    def test_another_run_s_checkpoints_are_not_its_own(self, model, tmp_path):
        """A resumed run is the one that it goes on with."""
        begun = dict(output_dir=tmp_path, save_strategy="steps", save_steps=1)
        trained(model, **begun)
        again = At(2, lambda control: setattr(control, "should_training_stop", True))
        trained(model, **begun, callbacks=[again])
        text = page_of(tmp_path)
        assert "checkpoint-2" in text and "checkpoint-4" not in text
        assert (tmp_path / "checkpoint-4").exists()
        trained(model, **begun | {"save_steps": 4}, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        text = page_of(tmp_path)
        assert all(f"checkpoint-{n}" in text for n in (1, 2, 4)) and "checkpoint-3" not in text

    def test_of_one_that_was_stopped(self, model, tmp_path):
        trained(
            model, callbacks=[At(3, lambda c: setattr(c, "should_training_stop", True))], output_dir=tmp_path
        )
        assert "Stopped by a callback after step 3 of 4." in page_of(tmp_path)

    @pytest.mark.parametrize("save_strategy", ["no", "steps"])
    def test_of_one_that_was_interrupted(self, model, tmp_path, save_strategy):
        interrupt = At(2, lambda control: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trained(
                model,
                callbacks=[interrupt],
                output_dir=tmp_path,
                save_strategy=save_strategy,
                report_samples=1,
            )
        text = page_of(tmp_path)
        assert "Interrupted after step 2 of 4." in text and "loss goes from" in text
        assert ("checkpoint-2" in text) == (save_strategy == "steps")
        assert "Before and after" not in text, "whoever ends a run does not wait for answers"

    def test_of_one_that_diverged(self, model, tmp_path):
        trainer = trainer_of(model, output_dir=tmp_path)
        trainer.model.params = {**model.params, "norm": {"weight": np.nan * model.params["norm"]["weight"]}}
        with pytest.raises(DivergenceError):
            trainer.train()
        assert "by DivergenceError: At step 1 the loss is nan" in page_of(tmp_path)

    def test_of_an_earlier_run_nothing_is_left(self, model, tmp_path):
        (tmp_path / "metrics.jsonl").touch()
        (tmp_path / "report.html").write_text("of before")
        seen = []
        look = At(1, lambda control: seen.append((tmp_path / "report.html").exists()))
        trained(model, output_dir=tmp_path, callbacks=[look])
        assert seen == [False] and "of before" not in page_of(tmp_path)

    def test_one_that_cannot_be_written_does_not_end_the_run(self, model, tmp_path, monkeypatch, caplog):
        def full(*_):
            raise OSError("No space left on device")

        monkeypatch.setattr(page, "write", full)
        assert lines(trained(model, output_dir=tmp_path)) == [1, 2, 3, 4]
        assert "the report could not be written: No space left" in caplog.text

    def test_no_folder_no_report(self, model, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        trained(model)
        assert not list(tmp_path.iterdir())


PAIRS = [{"prompt": f"the fox {i}", "completion": " jumps"} for i in range(8)]


class TestSamples:
    def test_before_and_after(self, model, tmp_path, monkeypatch):
        reports = []
        monkeypatch.setattr(page, "write", lambda report, path: reports.append(report))
        trainer = trainer_of(model, PAIRS, output_dir=tmp_path, report_samples=2, learning_rate=0.1)
        before = self.answer(trainer)
        trainer.train()
        first, second = reports[0].samples
        assert (first.prompt, second.prompt) == ("the fox 0", "the fox 1")
        assert first.expected == " jumps<|im_end|>".replace("<|im_end|>", models.tokenizer().eos_token)
        assert (first.before, first.after) == (before, self.answer(trainer))
        assert first.before != first.after

    def answer(self, trainer):
        model, tokenizer = trainer.model, models.tokenizer()
        prompt = tokenizer("the fox 0")["input_ids"]
        ids = model.generate([prompt], max_new_tokens=run_report.ANSWER_TOKENS, eos_token_id=None)
        return tokenizer.decode(ids[0][len(prompt) :])

    def test_they_change_nothing(self, model, plain, tmp_path):
        again = trained(model, output_dir=tmp_path, report_samples=1)
        assert_trees_equal(again.model.lora, plain[0].model.lora)
        assert "Before and after" in page_of(tmp_path)

    def test_of_what_is_evaluated_if_anything_is(self, model):
        trainer = trainer_of(model, PAIRS, eval_dataset=[{"prompt": "a dog", "completion": " x"}])
        tokenizer = models.tokenizer()
        assert [tokenizer.decode(each.prompt) for each in trainer._shown(3)] == ["a dog"]

    @pytest.mark.parametrize("rendered", [False, True])
    @pytest.mark.parametrize("assistant_only", [False, True])
    def test_a_conversation_goes_up_to_its_last_answer(self, model, rendered, assistant_only):
        tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml")
        turns = ("the fox", "jumps", "the dog", "is lazy")
        chat = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        rows = [{"text": text} if rendered else {"messages": chat}]
        trainer = SFTTrainer(model, SFTConfig(), train_dataset=rows, tokenizer=tokenizer)
        if assistant_only:
            train_on_responses_only(trainer)
        (each,) = trainer._shown(1)
        prompt = tokenizer.apply_chat_template(chat[:3], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(each.prompt) == prompt
        assert tokenizer.decode(each.expected).startswith("is lazy<|im_end|>\n")
        cut = trainer.samples[0].cut(0, len(each.prompt))  # nothing is left of its last answer
        earlier = run_report.shown(cut, response_marker(tokenizer))
        first = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(earlier.prompt) == first
        assert tokenizer.decode(earlier.expected).startswith("jumps<|im_end|>\n")

    def test_plain_text_is_cut_in_the_middle(self, model):
        (each,) = trainer_of(model)._shown(1)
        ids = ROWS[0]["input_ids"]
        assert (each.prompt, each.expected) == (ids[:10], ids[10:])

    def test_what_they_need(self, model):
        with pytest.raises(OptionError, match="without an output_dir"):
            SFTConfig(report_samples=1)
        with pytest.raises(OptionError, match="no tokenizer to read answers with"):
            trainer_of(dataclasses.replace(model, tokenizer=None), report_samples=1, output_dir="x")


class TestProfile:
    def traces(self, folder):
        return list(folder.rglob("*.xplane.pb"))

    def test_a_stretch_is_traced(self, model, plain, tmp_path, caplog):
        caplog.set_level("INFO", "jaxtune")
        trainer = trained(model, output_dir=tmp_path, profile_steps=(2, 3))
        assert len(self.traces(tmp_path / "profile")) == 1
        assert_trees_equal(trainer.model.lora, plain[0].model.lora)
        assert "the profile is in" in caplog.text

    def test_which_steps(self, model, tmp_path, monkeypatch):
        seen = []
        note = lambda what: seen.append((what, trainer.state.global_step))
        monkeypatch.setattr("jax.profiler.start_trace", lambda folder: note("start"))
        monkeypatch.setattr("jax.profiler.stop_trace", lambda: note("stop"))
        for steps, expected in [((2, 3), [("start", 1), ("stop", 3)]), ([1, 9], [("start", 0), ("stop", 4)])]:
            trainer = trainer_of(model, output_dir=tmp_path, profile_steps=steps)
            trainer.train()
            assert seen == expected
            seen.clear()

    def test_an_interrupt_ends_it(self, model, tmp_path, monkeypatch):
        seen = []
        monkeypatch.setattr("jax.profiler.start_trace", seen.append)
        monkeypatch.setattr("jax.profiler.stop_trace", lambda: seen.append("stop"))
        interrupt = At(2, lambda control: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            trained(model, output_dir=tmp_path, profile_steps=(1, 4), callbacks=[interrupt])
        assert seen == [tmp_path / "profile", "stop"]

    def test_nothing_otherwise(self, plain):
        assert not (plain[1] / "profile").exists()

    def test_steps_that_the_run_does_not_have(self, model, tmp_path):
        with pytest.raises(OptionError, match=r"profile_steps=\(5, 6\) of a run of 4 steps"):
            trained(model, output_dir=tmp_path, profile_steps=(5, 6))


class TestWhatScriptsCall:
    def test_metrics_and_state(self, model, tmp_path, caplog):
        caplog.set_level("INFO", "jaxtune")
        trainer = trainer_of(model, output_dir=tmp_path)
        result = trainer.train()
        trainer.log_metrics("train", result.metrics)
        assert f"train metrics: train_loss = {result.training_loss:.4f}" in caplog.text
        trainer.save_metrics("train", result.metrics)
        trainer.save_metrics("eval", {"eval_loss": 1.0})
        trainer.save_metrics("test", {"test_loss": 2.0}, combined=False)
        read = lambda name: json.loads((tmp_path / name).read_text())
        theirs = types.SimpleNamespace(
            args=types.SimpleNamespace(output_dir=tmp_path / "theirs"), is_world_process_zero=lambda: True
        )
        theirs.args.output_dir.mkdir()
        transformers.Trainer.save_metrics(theirs, "train", result.metrics)
        transformers.Trainer.save_metrics(theirs, "eval", {"eval_loss": 1.0})
        for name in ("train_results.json", "all_results.json"):
            assert read(name) == read(f"theirs/{name}")
        assert read("train_results.json") == result.metrics
        assert read("all_results.json") == result.metrics | {"eval_loss": 1.0}
        assert read("test_results.json") == {"test_loss": 2.0}
        trainer.save_state()
        assert read("trainer_state.json")["log_history"] == trainer.log_history
        assert trainer.is_world_process_zero()
        with pytest.raises(OptionError, match=r"save_state\(\) of a trainer without an output_dir"):
            trainer_of(model).save_state()

    def test_a_state_alone_is_no_checkpoint(self, model, tmp_path):
        trainer = trained(model, output_dir=tmp_path)
        trainer.save_state()
        with pytest.raises(Exception, match="which is no checkpoint of a run"):
            trainer.train(resume_from_checkpoint=tmp_path)

    def test_log_during_a_run_and_after(self, model, tmp_path):
        trainer = trainer_of(model, output_dir=tmp_path, max_steps=2)
        trainer.add_callback(At(2, lambda control: trainer.log({"mine": 7})))
        trainer.train()
        assert {"step": 2, "epoch": 1.0, "mine": 7} in trainer.log_history
        written = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()[1:])
        assert list(written) == trainer.log_history
        trainer.log({"later": 8})
        assert trainer.log_history[-1] == {"step": 2, "epoch": 1.0, "later": 8}

    def test_callbacks_come_and_go(self, model):
        class Other(TrainerCallback): ...

        one, other = At(1, lambda control: None), Other()
        trainer = trainer_of(model, callbacks=[one, Other])
        assert type(trainer.pop_callback(Other)) is Other
        trainer.add_callback(other)
        trainer.remove_callback(one)
        assert trainer.callbacks == [other]
        assert trainer.pop_callback(At) is None and trainer.callbacks == [other]

    def test_a_plot(self, plain, model):
        titles = [axes.get_title() for axes in plain[0].plot().axes]
        assert titles == ["loss", "gradient norm", "learning rate", "tokens per second"]
        with pytest.raises(OptionError, match="whose log is empty"):
            trainer_of(model).plot()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"logging_strategy": "step"}, "Did you mean 'steps'"),
        ({"logging_steps": 0}, "logging_steps=0"),
        ({"logging_first_step": "yes"}, "logging_first_step='yes'"),
        ({"disable_tqdm": "yes"}, "disable_tqdm='yes'"),
        ({"report_to": "wandbb"}, "Did you mean 'wandb'"),
        ({"report_to": 3}, "report_to=3"),
        ({"run_name": 3}, "run_name=3"),
        ({"logging_dir": 3}, "logging_dir=3"),
        ({"report_samples": -1}, "report_samples=-1"),
        ({"profile_steps": (3, 2), "output_dir": "x"}, r"profile_steps=\(3, 2\)"),
        ({"profile_steps": 5, "output_dir": "x"}, "profile_steps=5"),
        ({"profile_steps": (1, 2)}, "without an output_dir"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(OptionError, match=said):
        SeeingConfig(**settings)
