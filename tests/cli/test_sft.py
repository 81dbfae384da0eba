"""`jaxtune sft`: the command line says the same as a script, and a first run needs no argument."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys

import datasets
import numpy as np
import peft
import pytest
import transformers
import yaml
from safetensors.numpy import load_file

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, assets, train_on_responses_only
from jaxtune.cli import sft
from jaxtune.cli.dataset import Data
from jaxtune.cli.main import main
from jaxtune.data.formats import prepare
from jaxtune.training.callbacks import Callbacks

ROWS = assets.rows("json_train")[:8]
QUICK = shlex.split(
    "--max-seq-length 128 --per-device-train-batch-size 8 --gradient-accumulation-steps 1 --r 4"
)
"""All runs here have steps of the same shapes, so that they are compiled once."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, but for a dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, ROWS[:2])))
    return tmp_path


NUMBERS = ("loss", "grad_norm", "learning_rate", "eval_loss")


def run(*arguments):
    """On the embedded model."""
    return main(["sft", "--model-name", str(assets.TINY), *arguments])


def printed(capsys, *arguments):
    """The run that the arguments mean, as a file."""
    capsys.readouterr()
    assert main(["sft", *arguments, "--print-config"]) == 0
    return capsys.readouterr().out


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [record["loss"] for record in records(folder)[1:]]


# The command line


def test_help_answers_at_once():
    """Of the libraries that take seconds it imports none, and it has every option of SFTConfig."""
    code = """
import sys, time
from jaxtune.cli.main import main
try:
    main(["sft", "--help"])
except SystemExit:
    print(time.process_time(), *sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    seconds, *modules = last.split()
    assert not {"jax", "flax", "optax", "transformers", "datasets", "numpy"} & set(modules)
    assert float(seconds) < 1
    words = " ".join(shown).split()
    for field in dataclasses.fields(SFTConfig):
        assert f"--{field.name.replace('_', '-')}" in words


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--learning-rate 2e-4", "learning_rate: 0.0002"),
        ("--learning_rate=1", "learning_rate: 1"),
        ("--max-steps -1", "max_steps: -1"),
        ("--use-dora", "use_dora: true"),
        ("--cache-tokens false", "cache_tokens: false"),
        ("--max-grad-norm null", "max_grad_norm: null"),
        ("--target-modules q_proj v_proj", 'target_modules: ["q_proj", "v_proj"]'),
        ("--target-modules '[q_proj, v_proj]'", 'target_modules: ["q_proj", "v_proj"]'),
        ("--target-modules '.*_proj'", 'target_modules: ".*_proj"'),
        ("--target-modules '[qv]_proj'", 'target_modules: "[qv]_proj"'),
        ("--rank-pattern '{q_proj: 8}'", 'rank_pattern: {"q_proj": 8}'),
        ("--layers-to-transform 1 2", "layers_to_transform: [1, 2]"),
        ("--resume-from-checkpoint", "resume_from_checkpoint: true"),
        ("--dtype float32", 'dtype: "float32"'),
        ("--r 8 --r 9", "r: 9"),
    ],
)
def test_values_on_the_command_line_are_written_as_in_a_file(capsys, arguments, line):
    assert f"  {line}\n" in printed(capsys, *shlex.split(arguments))


def test_a_mistyped_option(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--learning-rat", "1"])
    assert "--learning-rate NUMBER" in capsys.readouterr().err


def test_a_value_of_another_type(capsys):
    with pytest.raises(SystemExit):
        main(["sft", "--rank-pattern", "{q_proj: high}"])
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "--rank-pattern: the text 'high' is not an integer" in said


def test_the_printed_run_reads_back_as_itself(here, capsys):
    text = printed(
        capsys,
        "--model-name",
        "x",
        "--dataset",
        "a",
        "b",
        "--quantization-config",
        "{n: 1, m: [x, null, 0.5]}",
    )
    (here / "run.yaml").write_text(text)
    assert printed(capsys, "--config", "run.yaml") == text
    assert printed(capsys, "--config=run.yaml") == text


def test_the_command_line_goes_before_the_file(here, capsys):
    (here / "run.yaml").write_text(
        "model_name: x\ndataset: mine.jsonl\nlearning_rate: 1e-3\nr: 8\nuse_dora: true"
    )
    text = printed(capsys, "--config", "run.yaml", "--learning-rate", "2e-3", "--use-dora", "false")
    for line in ('model_name: "x"', "learning_rate: 0.002", "r: 8", "use_dora: false"):
        assert f"  {line}\n" in text


def test_who_names_a_model_has_the_defaults_of_the_library(capsys):
    lines = printed(capsys, "--model-name", "x", "--dataset", "y").splitlines()
    assert f"  learning_rate: {SFTConfig().learning_rate}" in lines
    assert "  train_on_responses_only: false" in lines


def test_without_a_model_and_a_dataset_the_printed_run_is_to_be_filled_in(here, capsys):
    """Whatever else is named, it is the library's defaults, and none of the embedded model's settings."""
    (here / "run.yaml").write_text(text := printed(capsys))
    values = {name: value for each in yaml.safe_load(text).values() for name, value in each.items()}
    assert values["model_name"] is values["dataset"] is None
    assert values["max_steps"] == SFTConfig().max_steps
    assert str(assets.HERE) not in text
    named = printed(capsys, "--model-name", "x")
    assert named == text.replace("model_name: null", 'model_name: "x"')
    for arguments, missing in [([], "model_name"), (["--model-name", "x"], "dataset")]:
        assert main(["sft", "--config", "run.yaml", *arguments]) == 1
        assert f"there is no {missing}" in capsys.readouterr().err
    filled_in = ["--config", "run.yaml", "--model-name", str(assets.TINY), "--dataset", "mine.jsonl"]
    assert main(["sft", *filled_in, *QUICK, "--dry-run"]) == 0


def test_a_run_that_would_be_refused_is_not_printed(here, capsys):
    (here / "run.yaml").write_text("learning_rate: -1")
    assert main(["sft", "--config", "run.yaml", "--print-config"]) == 1
    shown = capsys.readouterr()
    assert "line 1 of run.yaml" in shown.err
    assert shown.out == ""


# What is wrong


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dataset", "mine.jsonl"], ["no model_name", str(assets.TINY)]),
        (["--model-name", "x"], ["no dataset", "--dataset"]),
        (["--output-dir", "null"], ["no output_dir"]),
        (["--config", "run.yml"], ["'run.yml'", "Did you mean 'run.yaml'"]),
        (["--config", "run.yaml"], ["line 2 of run.yaml", "learning_rate=-1", "at least 0"]),
    ],
)
def test_a_run_that_cannot_begin(here, capsys, arguments, said):
    (here / "run.yaml").write_text("model_name: x\nlearning_rate: -1\ndataset: mine.jsonl")
    assert main(["sft", *arguments]) == 1
    error = capsys.readouterr().err
    for each in said:
        assert each in error


def test_a_line_is_named_only_where_the_file_has_the_last_word(here, capsys):
    (here / "run.yaml").write_text("model_name: x\nlearning_rate: 1\ndataset: mine.jsonl")
    assert main(["sft", "--config", "run.yaml", "--learning-rate", "-1"]) == 1
    assert "line" not in capsys.readouterr().err


def test_a_mistyped_file_is_not_looked_for_on_the_hub(here, capsys):
    assert run("--dataset", "mine.jsnl") == 1
    assert "Did you mean 'mine.jsonl'" in capsys.readouterr().err


def test_a_dataset_that_the_hub_does_not_have(here, capsys):
    assert run("--dataset", "somebody/rows-of-mine") == 1
    error = capsys.readouterr().err
    assert "the hub's dataset 'somebody/rows-of-mine', split 'train'" in error
    assert "Traceback" not in error


def test_a_folder_of_somebody_else_is_refused_before_the_model_is_loaded(here, capsys):
    assert main(["sft", "--model-name", "nowhere", "--dataset", "mine.jsonl", "--output-dir", "."]) == 1
    assert "files that are not ours" in capsys.readouterr().err


# The data


def dry(capsys, *arguments):
    """What a dry run shows."""
    assert run("--dry-run", *QUICK, *arguments) == 0
    return capsys.readouterr().out


def test_a_dry_run_shows_the_data_and_trains_nothing(here, capsys):
    shown = dry(capsys, "--dataset", "mine.jsonl", "held.jsonl")
    assert "10 samples, 6 steps; nothing was trained" in shown  # two in each of three epochs
    assert ROWS[0]["messages"][0]["content"].split()[0] in shown
    assert not (here / "outputs").exists()


def test_one_is_no_plural(here, capsys, caplog):
    with caplog.at_level("INFO"):
        shown = dry(capsys, "--dataset", "held.jsonl", "--max-steps", "1", "--packing")
    assert "2 samples, 1 step; nothing was trained" in shown
    assert "2 samples in 1 packed row of at most 128 tokens" in caplog.text


def test_train_on_responses_only(here, capsys):
    shown = dry(capsys, "--dataset", "mine.jsonl", "--train-on-responses-only")
    whole = dry(capsys, "--dataset", "mine.jsonl")
    assert int(shown.split(" trained on")[0].split()[-1]) < int(whole.split(" trained on")[0].split()[-1])


def test_a_chat_template_by_its_name(here, capsys):
    shown = dry(capsys, "--dataset", "mine.jsonl", "--chat-template", "zephyr").splitlines()[1]
    assert shown.replace("¦", "").replace("⟦", "") == "<|user|>↵"


def test_a_dataset_of_the_hub(here, capsys, monkeypatch):
    """Its split and its configuration reach `datasets`; the other one is only for evaluation."""
    asked = []

    def load_dataset(*where, split):
        asked.append((*where, split))
        return datasets.Dataset.from_list(ROWS[:4])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shown = dry(capsys, "--dataset", "org/rows", "--eval-dataset", "org/rows")
    dry(
        capsys, *"--dataset org/rows --dataset-config de --dataset-split train[:9]".split(),
        *"--eval-dataset org/more --eval-split validation".split(),
    )  # fmt: skip
    assert "4 samples" in shown
    assert asked == [
        ("org/rows", None, "test"),
        ("org/rows", None, "train"),
        ("org/more", "de", "validation"),
        ("org/rows", "de", "train[:9]"),
    ]


ASKED = [{"user": "Say it.", "assistant": "It."}, {"user": "Name one.\nOf cities.", "assistant": "Rome."}]
"""What the four forms below say."""
FORMS = {
    "messages": [
        {"messages": [{"role": role, "content": text} for role, text in chat.items()]} for chat in ASKED
    ],
    "alpaca": [
        {"instruction": "Say it.", "input": "", "output": "It."},
        {"instruction": "Name one.", "input": "Of cities.", "output": "Rome."},
    ],
    "alpaca without input": [{"instruction": chat["user"], "output": chat["assistant"]} for chat in ASKED],
    "sharegpt": [
        {
            "conversations": [
                {"from": "human", "value": chat["user"]},
                {"from": "gpt", "value": chat["assistant"]},
            ]
        }
        for chat in ASKED
    ],
}


def tokens(rows):
    """What the embedded model would be trained on."""
    model, tokenizer = FastLanguageModel.from_pretrained(assets.TINY, max_seq_length=128)
    return [sample.input_ids.tolist() for sample in prepare(rows, tokenizer, max_length=model.max_seq_length)]


@pytest.mark.parametrize("form", ["alpaca", "alpaca without input", "sharegpt"])
@pytest.mark.parametrize("source", ["file", "hub"])
def test_usual_forms_become_conversations(here, monkeypatch, caplog, form, source):
    rows = FORMS[form]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split: datasets.Dataset.from_list(rows))
    data = Data(dataset="rows.jsonl" if source == "file" else "org/rows", eval_dataset="held.jsonl")
    with caplog.at_level("INFO"):
        trained, evaluated = data.load()
    assert tokens(trained) == tokens(FORMS["messages"])
    assert list(evaluated) == ROWS[:2]  # as they are, and nothing is said of them
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("jaxtune.cli")]
    assert said.startswith("dataset is in " + ("ShareGPT" if form == "sharegpt" else "Alpaca"))


def test_a_column_that_says_what_is_meant_goes_before_the_form(here):
    rows = [row | {"text": "mine"} for row in FORMS["alpaca"] + FORMS["sharegpt"]]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(Data(dataset="rows.jsonl").load()[0]) == rows
    assert list(Data(dataset="rows.jsonl").load(text_field="output")[0]) == rows


@pytest.mark.parametrize(
    "arguments",
    [
        "--dataset mine.jsonl --dataset-split train[:5]",
        "--dataset mine.jsonl --eval-dataset held.jsonl --eval-split validation",
        "--dataset mine.jsonl --eval-split validation",
        "--dataset mine.jsonl --dataset-config de",
    ],
)
def test_a_split_or_a_configuration_of_files_is_refused(here, capsys, arguments):
    assert run(*arguments.split()) == 1
    name, value = arguments.split()[-2:]
    assert f"{name[2:].replace('-', '_')}={value!r}" in capsys.readouterr().err


# Runs


def test_a_first_run_needs_no_argument(here, capsys):
    """Of its 60 steps two are enough here."""
    assert main(["sft", "--max-steps", "2", "--logging-steps", "1", "--optim", "sgd", "--r", "4"]) == 0
    shown = capsys.readouterr().out
    settings = records(here / "outputs")[0]["settings"]
    assert settings == settings | {k: v for k, v in sft.EMBEDDED.items() if k in settings} | {
        "max_steps": 2, "logging_steps": 1, "optim": "sgd",
    }  # fmt: skip
    first, last = losses(here / "outputs")
    assert f"2 steps: loss {first:.3f} -> {last:.3f}" in shown
    assert "adapter_model.safetensors" in shown
    assert 'FastLanguageModel.from_pretrained("outputs")' in shown
    assert "jaxtune sft --model-name" in shown
    base = transformers.AutoModelForCausalLM.from_pretrained(assets.TINY)
    peft.PeftModel.from_pretrained(base, here / "outputs")
    transformers.AutoTokenizer.from_pretrained(here / "outputs")


def test_it_trains_what_a_script_trains(here):
    """From a file and the command line, to the bit."""
    (here / "run.yaml").write_text(
        f"""
model:
  model_name: {assets.TINY}
  max_seq_length: 128
lora: {{r: 4, random_state: 5}}
data: {{dataset: mine.jsonl, eval_dataset: held.jsonl, train_on_responses_only: true}}
training:
  per_device_train_batch_size: 8
  gradient_accumulation_steps: 1
  learning_rate: 1e-1
  optim: sgd
  max_steps: 3
"""
    )
    assert main(["sft", "--config", "run.yaml", "--seed", "1", "--eval-strategy", "steps"]) == 0

    model, tokenizer = FastLanguageModel.from_pretrained(assets.TINY, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=4, random_state=5)
    args = SFTConfig(
        per_device_train_batch_size=8, gradient_accumulation_steps=1, learning_rate=0.1, optim="sgd", max_steps=3,
        seed=1, eval_strategy="steps",
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=ROWS, eval_dataset=ROWS[:2], tokenizer=tokenizer)
    train_on_responses_only(trainer).train()
    model.save_pretrained(here / "by-hand")

    for ours, by_hand in zip(records(here / "outputs")[1:], trainer.log_history, strict=True):
        assert [ours.get(name) for name in NUMBERS] == [by_hand.get(name) for name in NUMBERS]
    ours, by_hand = (load_file(here / name / "adapter_model.safetensors") for name in ("outputs", "by-hand"))
    assert ours.keys() == by_hand.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, by_hand[name])


def interrupt(patch, step):
    """Ctrl-C as that step begins."""
    begun = []

    def call(self, hook, **_):
        begun.append(hook)
        if hook == "on_step_begin" and begun.count(hook) == step:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(Callbacks, "call", call)


def test_ctrl_c_leaves_an_adapter_and_says_how_to_go_on(here, capsys, monkeypatch):
    steps = ["--dataset", "mine.jsonl", *QUICK, "--max-steps", "4"]
    assert run(*steps, "--output-dir", "undisturbed", "--save-strategy", "no") == 0
    undisturbed = losses(here / "undisturbed")
    capsys.readouterr()

    with monkeypatch.context() as patch:
        interrupt(patch, step=3)
        assert run(*steps, "--save-steps", "1") == 130
    shown = capsys.readouterr()
    assert "interrupted" in shown.err
    assert undisturbed[:3] == losses(here / "outputs")
    peft.PeftConfig.from_pretrained(here / "outputs")
    command = shown.out.split("To go on: jaxtune ")[1].splitlines()[0]
    assert main(shlex.split(command)) == 0
    assert losses(here / "outputs") == undisturbed


def test_after_ctrl_c_in_the_last_step_nothing_is_left_to_go_on_with(here, capsys, monkeypatch):
    interrupt(monkeypatch, step=1)
    assert run("--dataset", "mine.jsonl", *QUICK, "--max-steps", "1") == 130
    shown = capsys.readouterr().out
    assert (here / "outputs" / "checkpoint-1").exists()
    assert "1 step: loss" in shown and "report.html" in shown
    assert "To go on" not in shown


def test_a_run_without_a_checkpoint_of_its_own_does_not_offer_another_run_s(here, capsys, monkeypatch):
    steps = ["--dataset", "mine.jsonl", *QUICK, "--max-steps", "2"]
    assert run(*steps) == 0
    interrupt(monkeypatch, step=2)
    capsys.readouterr()
    assert run(*steps, "--save-strategy", "no") == 130
    assert "To go on" not in capsys.readouterr().out


def test_what_an_earlier_run_left_in_the_folder_is_said(here, capsys):
    steps = ["--dataset", "mine.jsonl", *QUICK, "--max-steps", "1"]
    assert run(*steps) == 0
    assert "earlier run" not in capsys.readouterr().out
    assert run(*steps, "--learning-rate", "1e-3") == 0
    assert (
        "outputs has an earlier run's adapter_model.safetensors and 1 checkpoint. " in capsys.readouterr().out
    )
    assert run(*steps, "--learning-rate", "1e-3", "--resume-from-checkpoint") == 0
    assert "earlier run" not in capsys.readouterr().out


def test_an_adapter_is_trained_on(here, capsys):
    """With the settings that it has, unless others are asked for, which is an error."""
    steps = ["--dataset", "mine.jsonl", *QUICK, "--max-steps", "1"]
    assert run(*steps, "--save-strategy", "no", "--eval-dataset", "held.jsonl") == 0
    assert "Evaluated: eval_loss " in capsys.readouterr().out
    default = [each for each in steps if each not in ("--r", "4")]
    again = ["sft", "--model-name", "outputs", *default, "--output-dir", "more"]
    assert main(again) == 0
    assert json.loads((here / "more" / "adapter_config.json").read_text())["r"] == 4
    (here / "again.yaml").write_text(printed(capsys, *again[1:]))
    assert main(["sft", "--config", "again.yaml", "--dry-run"]) == 0
    assert main([*again, "--r", "8"]) == 1
