"""The Modelfile: FROM, TEMPLATE, SYSTEM, and PARAMETER lines for stop strings and sampling.

How Ollama reads a value: it goes on to the end of the first line at which its quotes are closed, so that quotes may
stand within it; and of characters that are not printed (joined emoji have one, no-break spaces are some) only space,
tab and line breaks are kept.
"""

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtune.data.example_template import example_of
from jaxtune.export.ollama.formats import FORMATS, Format
from jaxtune.export.ollama.recognise import default_system, named_template_of
from jaxtune.loading.config import read_json
from jaxtune.loading.ends import GENERATION_FILE
from jaxtune.log import get_logger

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

log = get_logger(__name__)

MODELFILE = "Modelfile"


_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""transformers' names of what Ollama samples by, and Ollama's."""


def sampling_of(folder: Path) -> dict[str, float]:
    """What the makers of the model in `folder` recommend, by Ollama's names; nothing, if they say that nothing is
    sampled, or do not say."""
    path = folder / GENERATION_FILE
    settings = read_json(path) if path.is_file() else {}
    if not settings.get("do_sample"):
        return {}
    sampling = {"temperature": 1.0}  # transformers' own, where none is named
    for ours, theirs in _SAMPLING.items():
        if isinstance(value := settings.get(ours), int | float):
            sampling[theirs] = value
    return sampling


def modelfile(
    gguf_file: str,
    tokenizer: "Tokenizer",
    sampling: Mapping[str, float] | None = None,
    adapter_file: str | None = None,
) -> str:
    """The Modelfile for a GGUF beside it, whose name begins with the model's. It has a TEMPLATE if the tokenizer's chat
    template was made of an example, is one of our named ones, or prints the same as one; or if the tokenizer has none,
    and the model's name is known. Otherwise it has no TEMPLATE, and says so. `sampling` goes before what the makers of
    the template's first models recommend.

    `adapter_file` is a GGUF of what is added to that model."""
    form, system = _form(gguf_file, tokenizer)
    lines = [f"FROM ./{gguf_file}"]
    if adapter_file is not None:
        lines = [
            "# Put the base model beside this, or name one that Ollama has.",
            *lines,
            f"ADAPTER ./{adapter_file}",
        ]
    if form.go and (value := _quoted(_with_tokens(form.go, tokenizer), "chat template")):
        lines.append(f"TEMPLATE {value}")
        if system and (value := _quoted(system, "system message")):
            lines.append(f"SYSTEM {value}")
    else:
        log.warning(
            "The tokenizer's chat template is none that is known here, nor made of an example that Go has a form for: "
            "the Modelfile has no TEMPLATE."
        )
        lines.append("# No TEMPLATE: Ollama goes by the chat template in the GGUF.")
    stops = dict.fromkeys(filter(None, (*form.stops, tokenizer.eos_token)))
    lines += [f"PARAMETER stop {value}" for stop in stops if (value := _quoted(stop, "stop string"))]
    lines += [f"PARAMETER {name} {value:g}" for name, value in (sampling or form.sampling).items()]
    return "\n".join(lines) + "\n"


def _form(gguf_file: str, tokenizer: "Tokenizer") -> tuple[Format, str | None]:
    """How to prompt, and the system message of conversations that have none. Without Go where that is not known."""
    if (example := example_of(tokenizer)) is not None:
        return Format(example.go or "", ()), None if example.opening is None else example.default_system
    if (template := named_template_of(tokenizer, gguf_file)) is not None:
        log.info("The Modelfile has the chat template %s", template.name)
        return FORMATS[template.name], default_system(tokenizer, template)
    return Format("", ()), None


def _with_tokens(go: str, tokenizer: "Tokenizer") -> str:
    """The tokens that the template names are variables, set at its head. JSON's escapes are also Go's."""
    tokens = {"$bos": tokenizer.bos_token or "", "$eos": tokenizer.eos_token or ""}
    used = {name: json.dumps(token, ensure_ascii=False) for name, token in tokens.items() if name in go}
    return "".join(f"{{{{ {name} := {token} }}}}" for name, token in used.items()) + go


def _quoted(text: str, what: str) -> str | None:
    """As a value of the Modelfile; None, with a warning, if it cannot hold this text."""
    lines = re.split(r"[\r\n]", text)
    if any(line.rstrip().endswith('"""') for line in lines[:-1]):
        log.warning(
            'The %s has a line that ends with """, as values of a Modelfile do: it goes without it.', what
        )
        return None
    kept = " \t\r\n"
    dropped = sorted({c for c in text if c not in kept and unicodedata.category(c)[0] not in "LMNPS"})
    if dropped:
        names = ", ".join(f"U+{ord(c):04X}" for c in dropped)
        log.warning("Ollama will leave out of the %s what is not printed: %s.", what, names)
    many = what != "stop string" or len(lines) > 1 or '"' in text
    return f'"""{text}"""' if many else f'"{text}"'
