"""What comes with the package: a very small model that answers in a narrow world (tiny/, made by
scripts/pretrain_tiny.py), and additions for it (made by scripts/make_addition.py)."""

import json
from pathlib import Path

HERE = Path(__file__).parent
TINY = HERE / "tiny"
"""A Llama of 3.5 million weights as a Hugging Face folder; training.json has its accuracy by task."""


def rows(name: str) -> list[dict]:
    """A dataset by name: `addition_train`, or `addition_test`, whose problems pretraining never saw."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text().splitlines()]
