"""`jaxtune demo`, as a newcomer runs it, and what it leaves behind in other people's software."""

import json
import os
import subprocess
import sys

import peft
import pytest
import torch
import transformers

from jaxtune import FastLanguageModel, assets
from jaxtune.cli import exam
from jaxtune.cli.demo import SUMMARY
from jaxtune.cli.main import main
from tests.export.llama_cpp import LlamaCpp

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder that a run leaves, and what it printed. In a process of its own, with an empty home and no hub."""
    home = tmp_path_factory.mktemp("home")
    kept = {name: os.environ[name] for name in ("PATH", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")}
    done = subprocess.run(
        [sys.executable, "-m", "jaxtune", "demo", "--output-dir", "out", "--seed", "0"],
        cwd=home, env={**kept, "HOME": str(home), "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return home / "out", done.stdout


@pytest.fixture(scope="module")
def summary(ran):
    return json.loads((ran[0] / SUMMARY).read_text())


def test_a_folder_of_somebody_else_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    assert main(["demo", "--output-dir", str(tmp_path)]) == 1
    assert "thesis.tex" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_it_learns_what_it_could_not_do(summary):
    """On facts whose answers it has never seen in JSON."""
    accuracy = {moment: each["facts in JSON"] for moment, each in summary["accuracy"].items()}
    assert accuracy["before"] == 0
    assert min(accuracy["after SFT"], accuracy["after GRPO"], accuracy["merged, 16 bits"]) > 0.6


def test_it_keeps_what_it_knew(summary):
    accuracy = {moment: each["facts"] for moment, each in summary["accuracy"].items()}
    assert accuracy["before"] == 1
    assert min(accuracy.values()) > 0.85


def test_reinforcement_raises_addition_by_15_points(summary):
    """On problems that neither pretraining nor the demo has seen, and beyond what fine-tuning left."""
    accuracy = {moment: each["addition"] for moment, each in summary["accuracy"].items()}
    assert accuracy["after GRPO"] >= accuracy["before"] + 0.15
    assert accuracy["after GRPO"] >= accuracy["after SFT"] + 0.15


def test_it_says_what_it_wrote(ran):
    folder, printed = ran
    for name in ("adapter/", "merged/", "tiny.Q8_0.gguf", "Modelfile", "curves.png", "completions.jsonl"):
        assert name in printed
    assert assets.rows("facts_test")[0]["prompt"][0]["content"] in printed
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len((folder / "grpo" / "completions.jsonl").read_text().splitlines()) == 60 * 64


@pytest.fixture(scope="module")
def merged(ran):
    """A few questions, and what the merged folder says to them when we load it."""
    tests = {name: assets.rows(name)[::20] for name in ("json_test", "addition_test")}
    model, tokenizer = FastLanguageModel.from_pretrained(ran[0] / "merged", load_in_4bit=False)
    rows = [row for test in tests.values() for row in test]
    answers = [answer.said for test in exam.take(model, tokenizer, tests).values() for answer in test]
    return rows, answers


def by_transformers(model, tokenizer, row):
    ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
    whole = model.generate(**ids, max_new_tokens=exam.MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_transformers_answers_as_we_do(ran, merged):
    model = transformers.AutoModelForCausalLM.from_pretrained(ran[0] / "merged", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(ran[0] / "merged")
    rows, answers = merged
    assert [by_transformers(model, tokenizer, row) for row in rows] == answers


def test_peft_answers_as_we_do(ran, merged):
    """The original base and the adapter: apart, they are not rounded to 16 bits as their merge is."""
    base = transformers.AutoModelForCausalLM.from_pretrained(assets.TINY, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, ran[0] / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(ran[0] / "adapter")
    rows, answers = merged
    said = [by_transformers(model, tokenizer, row) for row in rows]
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= len(rows) - 1


@pytest.mark.parametrize("file", ["tiny.F16.gguf", "tiny.Q8_0.gguf"])
def test_llama_cpp_answers_as_we_do(ran, merged, file):
    """By the chat template that the file brings."""
    llama_cpp = LlamaCpp(ran[0] / "tiny_gguf" / file)
    rows, answers = merged
    said = [llama_cpp.answer(row["prompt"], exam.MAX_NEW_TOKENS).strip() for row in rows]
    assert sum(a == b for a, b in zip(said, answers, strict=True)) >= len(rows) - 1


def test_the_modelfile_has_the_template_and_its_end(ran):
    text = (ran[0] / "tiny_gguf" / "Modelfile").read_text()
    assert text.startswith("FROM ./tiny.Q8_0.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "<|im_end|>"' in text
