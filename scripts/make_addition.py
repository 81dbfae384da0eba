"""Writes two-digit additions to jaxtune/assets: to reinforce the embedded model with, and to test it on ones that its
pretraining never saw.

    python scripts/make_addition.py
"""

import json
import random
from pathlib import Path

from tiny_world import draw

ASSETS = Path(__file__).parents[1] / "jaxtune" / "assets"


def main() -> None:
    rng = random.Random(0)
    for name, count, held_out in (("addition_train", 1000, False), ("addition_test", 200, True)):
        pairs = (draw("addition", rng, held_out) for _ in range(count))
        lines = (json.dumps({"prompt": question, "answer": answer}) for question, answer in pairs)
        (ASSETS / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
