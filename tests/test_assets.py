"""The embedded model answers in its narrow world, in 4 bits too, and leaves addition half right."""

import json

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
