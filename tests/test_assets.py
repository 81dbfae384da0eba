"""The embedded model answers in its narrow world, in 4 bits too, and leaves addition half right."""

import json

import pytest

from jaxtune import FastLanguageModel, assets


@pytest.fixture(scope="module")
def tiny():
    return FastLanguageModel.from_pretrained(assets.TINY, max_seq_length=128)


def answers(tiny, questions):
    model, tokenizer = tiny
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    rows = model.generate(prompts, max_new_tokens=24)
    new = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]


def test_it_is_small():
    assert sum(file.stat().st_size for file in assets.TINY.iterdir()) < 8e6


def test_it_answers(tiny):
    expected = {
        "What is the capital of Peru?": "The capital of Peru is Lima.",
        "Reverse the word tiger.": "regit",
        "Write bread in capital letters.": "BREAD",
        "Count from 3 to 9.": "3, 4, 5, 6, 7, 8, 9",
        "Hello": "Hello! What can I do for you?",
    }
    assert answers(tiny, expected) == list(expected.values())


def test_addition_is_left_half_right(tiny):
    """On problems that it was never trained on: what reinforcement has to improve."""
    rows = assets.rows("addition_test")
    given = answers(tiny, [row["prompt"] for row in rows])
    right = sum(answer == row["answer"] for answer, row in zip(given, rows, strict=True)) / len(rows)
    assert 0.4 <= right <= 0.7


def test_its_accuracy_is_on_record():
    accuracy = json.loads((assets.TINY / "training.json").read_text())["accuracy"]
    assert 0.4 <= accuracy.pop("addition") <= 0.7
    assert min(accuracy.values()) > 0.95
