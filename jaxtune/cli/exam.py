"""Asking a model the questions of a test, all at once, and counting the answers that are right to the letter."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxtune.language_model import LanguageModel

MAX_NEW_TOKENS = 24


class Answered(NamedTuple):
    """A test's question, what is right, and what the model said."""

    question: str
    right: str
    said: str

    @property
    def is_right(self) -> bool:
        return self.said == self.right


def take(
    model: "LanguageModel", tokenizer: Any, tests: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, list[Answered]]:
    """`tests` are rows with a `prompt` (one message) and an `answer`, by name. Greedy: the same at every call."""
    rows = [row for test in tests.values() for row in test]
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for row in rows
    ]
    whole = model.generate(prompts, max_new_tokens=MAX_NEW_TOKENS)
    new = [ids[len(prompt) :] for ids, prompt in zip(whole, prompts, strict=True)]
    said = iter(tokenizer.batch_decode(new, skip_special_tokens=True))
    return {
        name: [Answered(row["prompt"][0]["content"], row["answer"], next(said).strip()) for row in test]
        for name, test in tests.items()
    }


def accuracy(answers: Sequence[Answered]) -> float:
    return sum(answer.is_right for answer in answers) / len(answers)
