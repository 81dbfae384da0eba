"""`jaxtune demo`: the whole path with the embedded model, in minutes, without a GPU and without a hub.

A model in 4 bits learns to answer in JSON from examples, and to add from a reward; then it is handed to PyTorch,
llama.cpp and Ollama. `demo` reads from top to bottom as a script of yours would.
"""

import json
import time
from pathlib import Path
from typing import Any

from jaxtune import assets
from jaxtune.cli import exam, report
from jaxtune.folders import cannot_write, refuse_strangers
from jaxtune.reporting import curves

FACTS, JSON, ADDITION = "facts", "facts in JSON", "addition"
SUMMARY = "jaxtune-demo.json"
"""Also what the folder is known by as the demo's own."""


def demo(output_dir: Path = Path("jaxtune-demo"), seed: int = 3407) -> int:
    """Fine-tunes the embedded model in 4 bits, reinforces it, exports it: minutes on two CPU cores.

    Args:
        output_dir: Where everything is written.
        seed: Of the adapter, the order of the data, and the sampling.

    Returns:
        0.
    """
    from jaxtune.api import FastLanguageModel
    from jaxtune.data.masking import train_on_responses_only
    from jaxtune.rl import GRPOConfig, GRPOTrainer
    from jaxtune.training import SFTConfig, SFTTrainer

    refuse_strangers(output_dir, marker=SUMMARY, others=())
    write_summary(output_dir, {"seed": seed})
    started = time.perf_counter()
    tests = {
        FACTS: assets.rows("facts_test"),
        JSON: assets.rows("json_test"),
        ADDITION: assets.rows("addition_test"),
    }
    answers: dict[str, dict[str, list[exam.Answered]]] = {}

    report.title("1  A model in 4 bits, with an adapter")
    model, tokenizer = FastLanguageModel.from_pretrained(assets.TINY, max_seq_length=128)
    model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, random_state=seed)
    model.print_trainable_parameters()
    asked = sum(map(len, tests.values()))
    with report.working(f"asking {asked} questions that it will not be trained on"):
        answers["before"] = exam.take(model, tokenizer, tests)

    report.title("2  Fine-tuning: examples of answers in JSON, which it has never seen")
    sft = SFTTrainer(
        model,
        SFTConfig(
            output_dir=output_dir / "sft", max_steps=60, learning_rate=2e-3, per_device_train_batch_size=32,
            gradient_accumulation_steps=1, logging_steps=5, seed=seed,
        ),
        train_dataset=assets.rows("json_train"),
        tokenizer=tokenizer,
    )  # fmt: skip
    sft = train_on_responses_only(sft)
    sft.train()
    with report.working("asking the same questions"):
        answers["after SFT"] = exam.take(model, tokenizer, tests)

    report.title("3  Reinforcement: additions, and a reward for the right sum")
    grpo = GRPOTrainer(
        model,
        is_right,
        GRPOConfig(
            output_dir=output_dir / "grpo", max_steps=60, learning_rate=1e-3, num_generations=8,
            per_device_train_batch_size=64, gradient_accumulation_steps=1, max_completion_length=8,
            logging_steps=5, log_completions=True, seed=seed,
        ),
        train_dataset=assets.rows("addition_train"),
        processing_class=tokenizer,
    )  # fmt: skip
    grpo.train()
    with report.working("asking the same questions"):
        answers["after GRPO"] = exam.take(model, tokenizer, tests)

    report.title("4  Export: to PEFT, transformers, llama.cpp and Ollama")
    with report.working("writing the adapter, the merged model, GGUF files"):
        model.save_pretrained(output_dir / "adapter", tokenizer)
        model.save_pretrained_merged(output_dir / "merged", tokenizer)
        model.save_pretrained_gguf(output_dir / "tiny", tokenizer, quantization_method=["q8_0", "f16"])
    with report.working("loading the merged model, and asking it the same questions"):
        merged, _ = FastLanguageModel.from_pretrained(output_dir / "merged", load_in_4bit=False)
        answers["merged, 16 bits"] = exam.take(merged, tokenizer, tests)

    seconds = time.perf_counter() - started
    accuracy = {
        moment: {test: exam.accuracy(each) for test, each in of_tests.items()}
        for moment, of_tests in answers.items()
    }
    curves.draw(
        [
            curves.Panel("SFT: facts in JSON", {"loss": curves.points(sft.log_history, "loss")}),
            curves.Panel("GRPO: addition", {"reward": curves.points(grpo.log_history, "reward")}),
        ],
        output_dir / "curves.png",
    )
    write_summary(output_dir, {"seed": seed, "seconds": seconds, "accuracy": accuracy})

    report.title("5  What came of it")
    report.conversations(answers["before"], answers["after GRPO"], shown={FACTS: 1, JSON: 3, ADDITION: 5})
    report.accuracies(accuracy, asked={test: len(rows) for test, rows in tests.items()})
    report.files(
        output_dir,
        {
            "adapter": "for peft, or FastLanguageModel.from_pretrained",
            "merged": "for transformers: AutoModelForCausalLM.from_pretrained",
            "tiny_gguf/tiny.Q8_0.gguf": "for llama.cpp: llama-cli -m tiny.Q8_0.gguf",
            "tiny_gguf/tiny.F16.gguf": "the same in 16 bits",
            "tiny_gguf/Modelfile": "for Ollama, there: ollama create tiny -f Modelfile",
            "curves.png": "the loss and the reward, step by step",
            "sft/report.html": "the run on one page",
            "sft/metrics.jsonl": "its settings and its numbers",
            "grpo/report.html": "the same",
            "grpo/metrics.jsonl": "the same",
            "grpo/completions.jsonl": "all that was tried, and its rewards",
            SUMMARY: "the accuracies above",
        },
    )
    report.closing(seconds)
    return 0


def is_right(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """The reward: 1 for a completion that is the answer to the letter, else 0."""
    said = [completion[0]["content"].strip() for completion in completions]
    return [float(text == right) for text, right in zip(said, answer, strict=True)]


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{SUMMARY}.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(folder / SUMMARY)
    except OSError as error:
        raise cannot_write(folder, error) from error
