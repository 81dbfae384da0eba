"""What Ollama makes of a Modelfile: its instructions, and the prompts of requests."""

import re
import unicodedata
from typing import Any, NamedTuple

from tests.export.go_template import render


class Model(NamedTuple):
    source: str
    template: str | None
    system: str | None
    parameters: list[tuple[str, str]]

    def prompt(self, messages: list[dict[str, Any]], **asked: Any) -> str:
        """SYSTEM is said first, unless the conversation begins with a system message of its own."""
        if self.system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        assert self.template is not None
        return render(self.template, messages, **asked)

    def stops(self) -> list[str]:
        return [value for name, value in self.parameters if name == "stop"]


def read(modelfile: str) -> Model:
    """A value goes on until it is closed at the end of a line; what is not printed is left out, but for spaces, tabs
    and line breaks."""
    text = "".join(c for c in modelfile if c in " \t\r\n" or unicodedata.category(c)[0] in "LMNPS")
    found: dict[str, str] = {}
    parameters = []
    lines = iter(re.split(r"(?<=[\r\n])", text))
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        instruction, value = line.split(maxsplit=1)
        if instruction == "PARAMETER":
            name, value = value.split(maxsplit=1)
        while (closed := _unquoted(value.strip())) is None:
            value += next(lines)
        if instruction == "PARAMETER":
            parameters.append((name, closed))
        else:
            assert instruction not in found, f"two of {instruction}"
            found[instruction] = closed
    unknown = set(found) - {"FROM", "TEMPLATE", "SYSTEM"}
    assert not unknown, unknown
    return Model(found["FROM"], found.get("TEMPLATE"), found.get("SYSTEM"), parameters)


def _unquoted(value: str) -> str | None:
    """None while the quotes at its beginning are open."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = value.endswith(quotes) and len(value) >= 2 * len(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value
