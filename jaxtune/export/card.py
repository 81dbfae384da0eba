"""The model card: README.md of everything that is saved. Its head is what the hub reads; then how to load the model,
and how it was trained.

A card that we wrote says so in a line of its own, and is written anew with the model; any other is left alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jaxtune.errors import OutputFolderError
from jaxtune.folders import cannot_write
from jaxtune.loading.hub import could_be_hub_id
from jaxtune.lora.config import LoraConfig
from jaxtune.reporting.last_run import LastRun
from jaxtune.version import __version__

CARD_FILE = "README.md"
OURS = "<!-- Written by jaxtune when it saved this model. Without this line, it leaves the card alone. -->"
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.gguf")
_TRAINING = "## Training"
_METHOD = "method"
"""The first fact of a run, behind those of its adapter."""
_HEAD = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)


class Form(NamedTuple):
    """What a folder holds."""

    library: str
    """As the hub calls it."""
    what: str
    language: str
    code: str
    """How to load it."""
    is_adapter: bool = False


ADAPTER = Form("peft", "A LoRA adapter for {base}, in PEFT's format.", "python", is_adapter=True, code="""\
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
""")  # fmt: skip
MODEL = Form("transformers", "{base}{trained}.", "python", code="""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
""")  # fmt: skip
GGUF = Form("gguf", "{base}{trained}, as GGUF for llama.cpp and Ollama.", "sh", code="""\
llama-cli -m {file}
ollama create {title} -f Modelfile
""")  # fmt: skip
GGUF_ADAPTER = Form("gguf", "A LoRA adapter for {base}, as GGUF for llama.cpp.", "sh", is_adapter=True, code="""\
llama-cli -m base.gguf --lora {file}
""")  # fmt: skip


class Card(NamedTuple):
    """What a card is made of."""

    form: Form
    name: str
    """The folder's, or the repository's id."""
    base: str
    """The base model's id or folder."""
    base_folder: Path | None = None
    """Where it is on this machine, if it is."""
    lora: LoraConfig | None = None
    run: LastRun | None = None
    is_trained: bool = True
    """Whether it is anything but its base."""
    is_dequantized: bool = False
    """Whether the base's quantised weights stand in for its original ones."""
    needs: str | None = None
    """What else has to be installed to load it."""
    files: Sequence[str] = ()
    """Of GGUF."""
    tags: Sequence[str] = ()
    datasets: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Written last: a folder without one is whole."""
        path = folder / CARD_FILE
        if path.exists() and not is_ours(path):
            return
        try:
            path.write_text(str(self), encoding="utf-8")
        except OSError as error:
            raise cannot_write(path, error) from error

    def __str__(self) -> str:
        head = yaml.safe_dump(self.head(), sort_keys=False, allow_unicode=True)
        parts = [
            f"---\n{head}---\n{OURS}",
            f"# {self._title}",
            self._what(),
            self._usage(),
            *self._training(),
        ]
        return "\n\n".join(parts) + f"\n\nMade with jaxtune {__version__}.\n"

    @property
    def _title(self) -> str:
        return self.name.rpartition("/")[2]

    def head(self) -> dict[str, Any]:
        """By the names that the hub reads."""
        base = self.base if _is_on_hub(self.base) else None
        kinds = ("lora" if self.lora else None, self.run.method if self.run else None)
        found = {
            "base_model": base,
            "base_model_relation": self._relation() if base else None,
            **_license(self.base_folder),
            "library_name": self.form.library,
            "pipeline_tag": "text-generation",
            "tags": list(dict.fromkeys(filter(None, ("jaxtune", *kinds, *self.tags)))),
            "datasets": list(self.datasets) or None,
        }
        return {name: value for name, value in found.items() if value is not None}

    def _relation(self) -> str | None:
        """A GGUF of what was not trained is the base, quantised."""
        if self.form.is_adapter or self.is_trained:
            return "adapter" if self.form.is_adapter else "finetune"
        return "quantized" if self.form is GGUF else None

    def _what(self) -> str:
        link = f"[{self.base}](https://huggingface.co/{self.base})"
        base = (
            link if _is_on_hub(self.base) else f"`{Path(self.base).name}`"
        )  # whose machine it was, nobody asks
        what = self.form.what.format(base=base, trained=", fine-tuned" if self.is_trained else "")
        return f"{what} Its weights are made of the base's quantised ones." if self.is_dequantized else what

    def _usage(self) -> str:
        file = self.files[0] if self.files else None
        code = self.form.code.format(name=self.name, file=file, title=self._title.lower())
        needs = f"It takes `pip install {self.needs}`.\n\n" if self.needs else ""
        return f"## Use\n\n{needs}```{self.form.language}\n{code}```"

    def _training(self) -> Iterator[str]:
        of_adapter = adapter_facts(self.lora) if self.lora else {}
        of_run = {_METHOD: self.run.method, **self.run.facts} if self.run else {}
        rows = [
            f"| {_cell(name)} | {_cell(value)} |" for name, value in (*of_adapter.items(), *of_run.items())
        ]
        if rows:
            yield "\n".join([f"{_TRAINING}\n", "| | |", "|---|---|", *rows])


def adapter_facts(config: LoraConfig) -> dict[str, str]:
    """Of the settings, those that say what an adapter is; others only where they are not the default."""
    targets = config.target_modules
    facts = {
        "rank": config.r,
        "alpha": f"{config.lora_alpha:g}",
        "modules": f"`{targets}`" if isinstance(targets, str) else ", ".join(targets),
        "trained whole": ", ".join(config.modules_to_save),
        "dropout": f"{config.lora_dropout:g}" if config.lora_dropout else "",
        "ranks of their own": _pairs(config.rank_pattern),
        "alphas of their own": _pairs(config.alpha_pattern),
        "scaled by": "alpha / sqrt(rank) (rsLoRA)" if config.use_rslora else "",
        "lengths trained apart": "yes (DoRA)" if config.use_dora else "",
        "biases": config.bias if config.bias != "none" else "",
        "began as": "" if config.init_lora_weights is True else str(config.init_lora_weights),
    }
    return {name: str(value) for name, value in facts.items() if value}


def read_run(folder: Path) -> LastRun | None:
    """The run that a card of ours in that folder tells of."""
    try:
        text = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    if OURS not in text:
        return None
    section = text.partition(f"\n{_TRAINING}\n")[2].partition("\n#")[0]
    rows = [_cells(line) for line in section.splitlines() if line.startswith("|")]
    facts = [(name, value) for name, value in (row for row in rows if len(row) == 2) if name.strip("-:")]
    begin = next((i for i, (name, _) in enumerate(facts) if name == _METHOD), None)
    return None if begin is None else LastRun(facts[begin][1], dict(facts[begin + 1 :]))


def is_ours(card: Path) -> bool:
    """Whether we wrote this card."""
    return OURS in card.read_text(encoding="utf-8", errors="replace")


def refuse_foreign_model(folder: Path) -> None:
    """Raises if the folder holds weights, and no card of ours beside them: gigabytes that may be somebody else's."""
    weights = next((file for kind in _WEIGHTS for file in sorted(folder.glob(kind))), None)
    card = folder / CARD_FILE
    if weights is None or (card.is_file() and is_ours(card)):
        return
    raise OutputFolderError(
        f"{folder} holds a model ({weights.name}), and no {CARD_FILE} that says that jaxtune wrote it.",
        expected="a new or empty folder, or one of ours.",
        fix="Choose another folder, or delete this one first.",
    )


def _pairs(pattern: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"`{name}` {value:g}" for name, value in pattern)


def _cell(value: str) -> str:
    return value.replace("|", r"\|").replace("\n", " ")


def _cells(row: str) -> list[str]:
    """Of a row of a table, which begins and ends with a bar."""
    return [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", row.strip())[1:-1]]


def _is_on_hub(name: str) -> bool:
    return could_be_hub_id(name) and not Path(name).exists()


def _license(folder: Path | None) -> Mapping[str, str]:
    """What the base's own card says."""
    path = None if folder is None else folder / CARD_FILE
    if path is None or not path.is_file():
        return {}
    match = _HEAD.match(path.read_text(encoding="utf-8", errors="replace"))
    try:
        head = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    if not isinstance(head, dict):
        return {}
    names = ("license", "license_name", "license_link")
    found = {name: head[name] for name in names if isinstance(head.get(name), str)}
    if not found.get("license_link", "https:").startswith("https:"):
        del found["license_link"]  # a file beside that card
    return found
