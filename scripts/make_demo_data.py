"""Writes what the demo learns from and is tested on, to jaxtune/assets:

addition_*  two-digit additions, to reinforce the embedded model with; tested on ones that its pretraining never saw
json_*      facts that it knows, with the answer in JSON, which it has never seen; tested on other facts. Among what is
            learnt from are answers in words too, so that it learns to answer in JSON when it is asked to
facts_test  the facts of json_test, to be answered in words, as before

    python scripts/make_demo_data.py
"""

import json
import random
from pathlib import Path

from tiny_world import ADDITIONS, FACTS, Fact, addition, in_json, is_held_out

ASSETS = Path(__file__).parents[1] / "jaxtune" / "assets"


def user(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def in_words(fact: Fact) -> tuple[str, str]:
    return fact.question, fact.answer


def conversation(question: str, answer: str) -> dict:
    return {"messages": [*user(question), {"role": "assistant", "content": answer}]}


def problem(question: str, answer: str) -> dict:
    return {"prompt": user(question), "answer": answer}


def additions(count: int, held_out: bool, rng: random.Random) -> list[dict]:
    """Each problem once. Those held out are held out whichever way round they are asked."""
    found: dict[tuple[int, int], tuple[str, str]] = {}
    while len(found) < count:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if is_held_out(a, b) == is_held_out(b, a) == held_out:
            found[a, b] = addition(a, b, rng.randrange(len(ADDITIONS)))
    return [problem(question, answer) for question, answer in found.values()]


def main() -> None:
    rng = random.Random(0)
    # Apart in both directions: who learns that Oslo is Norway's capital is not asked for the capital of Norway.
    joined = sorted({tuple(sorted(asked[0].about)) for asked in FACTS})
    apart = [frozenset(pair) for pair in rng.sample(joined, 60)]
    tested = [rng.choice(rng.choice([asked for asked in FACTS if asked[0].about == pair])) for pair in apart]
    learnt = [asked for asked in FACTS if asked[0].about not in apart]
    files = {
        "addition_train": additions(1000, held_out=False, rng=rng),
        "addition_test": additions(200, held_out=True, rng=rng),
        "json_train": [
            conversation(*said)
            for asked in learnt
            for said in [*map(in_json, asked), in_words(rng.choice(asked))]
        ],
        "json_test": [problem(*in_json(fact)) for fact in tested],
        "facts_test": [problem(*in_words(fact)) for fact in tested],
    }
    for name, rows in files.items():
        (ASSETS / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


if __name__ == "__main__":
    main()
