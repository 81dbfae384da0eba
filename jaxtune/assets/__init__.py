"""What comes with the package: a very small model that answers in a narrow world (tiny/, made by
scripts/pretrain_tiny.py), and what it can be taught (made by scripts/make_demo_data.py)."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TINY = HERE / "tiny"
"""A Llama of 3.5 million weights as a Hugging Face folder; training.json has its accuracy by task."""


def rows(name: str) -> list[dict[str, Any]]:
    """A dataset by name. To learn from: `addition_train` (a prompt and its answer) and `json_train` (conversations
    about facts that the model knows, with answers in JSON, which it does not know, where that is asked for). To be
    tested on, a prompt and its answer each: `addition_test`, whose problems pretraining never saw; `json_test`, of
    other facts than `json_train`; `facts_test`, the same in words."""
    return [json.loads(line) for line in (HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
