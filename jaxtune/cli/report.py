"""How commands look in a terminal: titles, a spinner where there is no progress to count, tables."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxtune.cli.exam import Answered
from jaxtune.log import counted

Answers = Mapping[str, Sequence[Answered]]
"""By the names of the tests."""

RUN_FILES = {
    "adapter_model.safetensors": "the adapter; its folder is for peft, or FastLanguageModel.from_pretrained",
    "model.safetensors": "the model; its folder is for transformers, or FastLanguageModel.from_pretrained",
    "metrics.jsonl": "the settings, and the numbers of the run",
    "report.html": "the run on a page, for a browser",
}
"""What a run may leave, and what it is for."""
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")

console = Console(highlight=False)


def say(text: str) -> None:
    console.print(escape(text), soft_wrap=True)


def title(text: str) -> None:
    console.print(f"\n[bold]{escape(text)}[/]")


def working(text: str) -> AbstractContextManager:
    """While something is under way that takes seconds; where there is no terminal, a line."""
    if not console.is_terminal:
        console.print(f"{escape(text)} ...")
    return console.status(f"{escape(text)} ...")


def conversations(before: Answers, after: Answers, shown: Mapping[str, int]) -> None:
    """The first few questions of each test, and what was said to them. Right answers are green."""
    heading = "The same questions before and after"
    table = Table("question", "before", "after", title=heading, title_justify="left")
    for test, count in shown.items():
        for first, then in list(zip(before[test], after[test], strict=True))[:count]:
            table.add_row(escape(first.question), _cell(first), _cell(then))
        table.add_section()
    console.print(table)


def _cell(answer: Answered) -> str:
    return (
        f"[{'green' if answer.is_right else 'red'}]{'✓' if answer.is_right else '✗'} {escape(answer.said)}[/]"
    )


def accuracies(accuracy: Mapping[str, Mapping[str, float]], asked: Mapping[str, int]) -> None:
    table = Table(
        "right to the letter",
        *accuracy,
        title="All questions, none of which it was taught here",
        title_justify="left",
    )
    for test, count in asked.items():
        table.add_row(
            f"{escape(test)} ({count} questions)", *(f"{each[test]:.0%}" for each in accuracy.values())
        )
    console.print(table)
    console.print(
        "Reinforcement saw nothing but additions. The merge is of the original 16-bit weights, "
        "not of the 4-bit ones that were trained on."
    )


def files(folder: Path, uses: Mapping[str, str]) -> None:
    table = Table("file", "size", "what to do with it", title=f"Written to {folder}", title_justify="left")
    for name, use in uses.items():
        path = folder / name
        table.add_row(
            escape(name + "/" * path.is_dir()),
            size_text(sum(map(_size, path.rglob("*"))) or _size(path)),
            escape(use),
        )
    console.print(table)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def size_text(size: float) -> str:
    """1234 -> "1.2 kB"; 7_000_000 -> "7.0 MB"."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def used(folder: Path) -> None:
    """Says so of a folder with what an earlier run left, before one begins anew in it."""
    weights = [name for name in WEIGHTS if (folder / name).exists()]
    checkpoints = sum(1 for _ in folder.glob("checkpoint-*"))
    if found := weights + [counted(checkpoints, "checkpoint")] * bool(checkpoints):
        goes_on = "; --resume-from-checkpoint goes on with that one" if checkpoints else ""
        say(
            f"{folder} has an earlier run's {' and '.join(found)}. This run begins anew, and writes over what has the "
            f"same name. Another --output-dir leaves it alone{goes_on}."
        )


def trained(folder: Path, history: Sequence[Mapping[str, float]]) -> None:
    """What a run came to, and where it lies."""
    losses = [record["loss"] for record in history if "loss" in record]
    if losses:
        steps = int(max(record["step"] for record in history))
        title(f"{counted(steps, 'step')}: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    files(folder, {name: use for name, use in RUN_FILES.items() if (folder / name).exists()})


def evaluated(metrics: Mapping[str, float]) -> None:
    losses = {name: value for name, value in metrics.items() if name.endswith("loss")}
    say("Evaluated: " + ", ".join(f"{name} {value:.4f}" for name, value in losses.items()))


def what_next(folder: Path) -> None:
    """What to type once an adapter is there."""
    say(
        "Next, in Python:\n"
        "  from jaxtune import FastLanguageModel\n"
        f'  model, tokenizer = FastLanguageModel.from_pretrained("{folder}")\n'
        '  model.save_pretrained_merged("merged", tokenizer)  # or save_pretrained_gguf, for llama.cpp and Ollama\n'
        "Or from here:\n"
        "  jaxtune sft --model-name <hub id or folder> --dataset <file or hub id>\n"
        "  jaxtune sft --print-config > run.yaml  # every option, to fill in; then: jaxtune sft --config run.yaml"
    )


def closing(seconds: float) -> None:
    console.print(
        f"\nDone in {seconds:.0f} s. The same as code: README.md, notebooks/01_first_finetune.ipynb"
    )
