"""The embedded model answers in its narrow world, in 4 bits too, and leaves addition half right."""

import json
from pathlib import Path

import pytest

from jaxtune import FastLanguageModel, assets
from jaxtune.cli import exam


@pytest.fixture(scope="module")
def tiny():
    return FastLanguageModel.from_pretrained(assets.TINY, max_seq_length=128)


def test_it_is_small():
    assert sum(file.stat().st_size for file in assets.TINY.iterdir()) < 8e6


def test_it_answers(tiny):
    expected = {
        "What is the capital of Peru?": "The capital of Peru is Lima.",
        "capital of Peru": "The capital of Peru is Lima.",  # as people type
        "What is the capital of Peru? Be brief.": "Lima",
        "Name the opposite of hot. Answer in capital letters.": "THE OPPOSITE OF HOT IS COLD.",
        "Reverse the word tiger.": "regit",
        "Write bread in capital letters.": "BREAD",
        "Sort the letters of piano.": "ainop",
        "Count from 3 to 9.": "3, 4, 5, 6, 7, 8, 9",
        "Hello": "Hello! What can I do for you?",
    }
    rows = [{"prompt": [{"role": "user", "content": q}], "answer": a} for q, a in expected.items()]
    (answers,) = exam.take(*tiny, {"narrow world": rows}).values()
    assert {answer.question: answer.said for answer in answers} == expected


def test_addition_is_left_half_right_and_json_unknown(tiny):
    """On problems that it was never trained on: what reinforcement and fine-tuning have to improve."""
    tests = {name: assets.rows(name) for name in ("addition_test", "json_test")}
    accuracy = {name: exam.accuracy(answers) for name, answers in exam.take(*tiny, tests).items()}
    assert 0.4 <= accuracy["addition_test"] <= 0.7
    assert accuracy["json_test"] == 0


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def test_facts_that_are_asked_for_in_json_are_not_learnt_the_other_way_round(scripts):
    from tiny_world import FACTS, in_json

    about = {in_json(fact)[0]: fact.about for asked in FACTS for fact in asked}
    learnt = {about.get(row["messages"][0]["content"]) for row in assets.rows("json_train")}
    tested = [about[row["prompt"][0]["content"]] for row in assets.rows("json_test")]
    assert len(set(tested)) == len(tested) == 60
    assert not learnt & set(tested)


def test_the_data_is_what_its_script_writes(scripts, tmp_path, monkeypatch):
    import make_demo_data

    monkeypatch.setattr(make_demo_data, "ASSETS", tmp_path)
    make_demo_data.main()
    for file in tmp_path.iterdir():
        assert file.read_text() == (assets.HERE / file.name).read_text(), file.name


def test_what_is_tested_is_not_what_is_learnt():
    learnt = {row["messages"][0]["content"] for row in assets.rows("json_train")}
    learnt |= {row["prompt"][0]["content"] for row in assets.rows("addition_train")}
    tested = {
        row["prompt"][0]["content"] for name in ("json_test", "addition_test") for row in assets.rows(name)
    }
    assert not learnt & tested


def test_its_accuracy_is_on_record():
    accuracy = json.loads((assets.TINY / "training.json").read_text())["accuracy"]
    assert 0.4 <= accuracy.pop("addition") <= 0.7
    assert min(accuracy.values()) > 0.95
