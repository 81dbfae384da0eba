"""A Modelfile for Ollama: the GGUF, the chat template in Go's template language, the strings at which to stop.

Each Go template prints what the jinja template of the same name prints, byte for byte, but for two things: the bos
token, which the runtime adds, and white space at the ends of a message, which Go has no function to trim. A
conversation that ends with the assistant's words is left open, so that the model goes on with them.
"""

from typing import Any

from jaxtune.data.example_template import example_of
from jaxtune.data.templates import template_of
from jaxtune.log import get_logger

log = get_logger(__name__)

MODELFILE = "Modelfile"

# `slice` gives the messages from one on: a single one left is the last.
_EACH = "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"

_CHATML = (
    _EACH
    + """<|im_start|>{{ .Role }}
{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|im_end|>
{{ if $last }}<|im_start|>assistant
{{ end }}{{ end }}{{ end }}"""
)

_LLAMA_TURN = """<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}{{ if not (and $last (eq .Role "assistant")) }}<|eot_id|>{{ end }}"""

_LLAMA_ANSWER = """{{ if and $last (ne .Role "assistant") }}<|start_header_id|>assistant<|end_header_id|>

{{ end }}"""

_LLAMA_3 = _EACH + _LLAMA_TURN + _LLAMA_ANSWER + "{{ end }}"

# There is always a system turn, for the dates; the first message goes into it if it is a system message.
_LLAMA_3_1 = (
    """<|start_header_id|>system<|end_header_id|>

Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

{{ range $i, $_ := .Messages }}{{ if and (eq $i 0) (eq .Role "system") }}{{ .Content }}{{ end }}{{ end }}<|eot_id|>"""
    + _EACH
    + """{{ if or (ne $i 0) (ne .Role "system") }}"""
    + _LLAMA_TURN
    + "{{ end }}"
    + _LLAMA_ANSWER
    + "{{ end }}"
)

_LLAMA_STOPS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GO_TEMPLATES = {"chatml": _CHATML, "llama-3": _LLAMA_3, "llama-3.1": _LLAMA_3_1}
"""By the names of `data.templates.TEMPLATES`."""
_STOPS = {"chatml": ("<|im_start|>", "<|im_end|>"), "llama-3": _LLAMA_STOPS, "llama-3.1": _LLAMA_STOPS}


def modelfile(gguf_file: str, tokenizer: Any) -> str:
    """The Modelfile for a GGUF beside it. It has a TEMPLATE for our named chat templates and for those that were made
    of an example; without one of these it has none, and says so."""
    lines = [f"FROM ./{gguf_file}"]
    template, example = template_of(tokenizer), example_of(tokenizer)
    stops: tuple[str, ...] = ()
    if template is not None and template.name in GO_TEMPLATES:
        lines.append(f'TEMPLATE """{GO_TEMPLATES[template.name]}"""')
        stops = _STOPS[template.name]
        if system := _default_system(tokenizer, template.jinja):
            lines.append(f'SYSTEM """{system}"""')
    elif example is not None and example.go is not None:
        lines.append(f'TEMPLATE """{example.go}"""')
        if example.opening is not None:
            lines.append(f'SYSTEM """{example.default_system}"""')
    else:
        log.warning(
            "The tokenizer has none of the chat templates %s, and none made of an example: the Modelfile has no "
            "TEMPLATE.",
            ", ".join(GO_TEMPLATES),
        )
        lines.append("# No TEMPLATE: Ollama compares the chat template in the GGUF with those that it knows.")
    if tokenizer.eos_token is not None:
        stops = (*stops, tokenizer.eos_token)
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    return "\n".join(lines) + "\n"


def _default_system(tokenizer: Any, jinja: str) -> str:
    """The system message that `get_chat_template` put before a template, found by letting it print itself."""
    before = tokenizer.chat_template.removesuffix(jinja)
    first = "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{% endif %}"
    message = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], chat_template=before + first, tokenize=False
    )
    message = message.removeprefix(tokenizer.bos_token or "")
    if '"""' in message:
        log.warning('The system message holds """, which a Modelfile cannot: the Modelfile goes without it.')
        return ""
    return message
