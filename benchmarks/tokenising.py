"""How fast datasets become samples, by their form; and again, from kept tokens.

PYTHONPATH=. python benchmarks/tokenising.py

Of the processor's time, that of the tokenizer's threads is spread over the cores; the rest is Python's, on one. The
tokenizer is that of the demo's model, byte-level BPE with 2048 tokens, and the words are the demo's.
"""

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

from transformers import AutoTokenizer

from benchmarks.harness import record
from jaxtune import assets
from jaxtune.data.formats import prepare

ROLES = ("user", "assistant")


def forms(count: int) -> dict[str, tuple[list[dict], dict]]:
    """Rows of each form, with about 360 tokens in each, and options of `prepare`."""
    words = [
        word
        for row in assets.rows("json_train")
        for message in row["messages"]
        for word in message["content"].split()
    ]
    draw = random.Random(0)

    def say(words_at_most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(words_at_most // 4, words_at_most)))

    texts = [{"text": say(240)} for _ in range(count)]
    pairs = [{"prompt": say(100), "completion": f" {say(140)}"} for _ in range(count)]
    chats = [
        {"messages": [{"role": ROLES[turn % 2], "content": say(60)} for turn in range(4)]}
        for _ in range(count)
    ]
    return {
        "text": (texts, {}),
        "prompt and completion": (pairs, {}),
        "messages": (chats, {}),
        "messages, assistant_only_loss": (chats, {"assistant_only_loss": True}),
    }


def measure(name: str, rows: list[dict], options: dict) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(assets.TINY)
    with tempfile.TemporaryDirectory() as cache:
        began, all_began, python_began = time.perf_counter(), time.process_time(), time.thread_time()
        samples = prepare(rows, tokenizer, max_length=None, cache=Path(cache), **options)
        seconds = time.perf_counter() - began
        python = time.thread_time() - python_began
        threads = time.process_time() - all_began - python
        began = time.perf_counter()
        again = prepare(rows, tokenizer, max_length=None, cache=Path(cache), **options)
        seconds_again = time.perf_counter() - began
    assert [sample.num_tokens for sample in samples] == [sample.num_tokens for sample in again]
    return {
        "form": name,
        "rows": len(rows),
        "tokens": sum(sample.num_tokens for sample in samples),
        "seconds": seconds,
        "rows_per_second": len(rows) / seconds,
        "cpu_seconds_of_python": python,
        "cpu_seconds_of_threads": threads,
        "rows_per_second_kept": len(rows) / seconds_again,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--name", default="tokenising", help="of the result file")
    args = parser.parse_args()
    results = []
    for name, (rows, options) in forms(args.rows).items():
        results.append(measure(name, rows, options))
        print(results[-1])
        record(args.name, results, cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
