"""As much of Go's text/template as our Modelfiles use: fields, variables, range, if, and functions without pipes.

Go itself is no dependency of the tests. What this prints for the templates of `jaxtune.export.ollama` was compared once
with Go 1.19's own output, and was the same in every case of test_ollama.py.
"""

import re
from collections.abc import Iterator
from typing import Any

_ACTION = re.compile(r"\{\{(- )?\s*(.*?)\s*( -)?\}\}", re.DOTALL)
_WORD = re.compile(r'"[^"]*"|[()]|[^\s()]+')
_FUNCTIONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "and": lambda *each: next((x for x in each if not x), each[-1]),
    "or": lambda *each: next((x for x in each if x), each[-1]),
    "not": lambda x: not x,
    "len": len,
    "slice": lambda items, start: items[start:],
}


def render(template: str, messages: list[dict[str, str]]) -> str:
    """Of messages with the keys role and content, which a template calls .Role and .Content."""
    root = {"Messages": [{key.capitalize(): value for key, value in each.items()} for each in messages]}
    printed: list[str] = []
    _run(_nest(_parts(template)), root, {"$": root}, printed)
    return "".join(printed)


def _parts(template: str) -> Iterator[tuple[str, str]]:
    """("text", ...) and ("action", ...) in turn; a dash trims the text beside it."""
    end, trim = 0, False
    for found in _ACTION.finditer(template):
        text = template[end : found.start()]
        text = text.lstrip() if trim else text
        yield "text", text.rstrip() if found[1] else text
        yield "action", found[2]
        end, trim = found.end(), bool(found[3])
    yield "text", template[end:].lstrip() if trim else template[end:]


def _nest(parts: Iterator[tuple[str, str]]) -> list:
    """A block is [kind, header, body]."""
    nodes: list = []
    for kind, content in parts:
        if content == "end" and kind == "action":
            return nodes
        if kind == "action" and content.split()[0] in ("range", "if"):
            head, rest = content.split(maxsplit=1)
            nodes.append([head, rest, _nest(parts)])
        else:
            nodes.append([kind, content, None])
    return nodes


def _run(nodes: list, dot: Any, variables: dict[str, Any], printed: list[str]) -> None:
    for kind, content, body in nodes:
        if kind == "text":
            printed.append(content)
        elif kind == "if":
            if _value(content, dot, variables):
                _run(body, dot, variables, printed)
        elif kind == "range":
            names, items = content.split(" := ")
            index, element = names.split(", ")
            for i, item in enumerate(_value(items, dot, variables)):
                _run(body, item, {**variables, index: i, element: item}, printed)
        elif " := " in content:
            name, expression = content.split(" := ")
            variables[name] = _value(expression, dot, variables)
        else:
            printed.append(_value(content, dot, variables))


def _value(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    words = _WORD.findall(expression)

    def operand() -> Any:
        word = words.pop(0)
        if word == "(":
            inner = call()
            words.pop(0)
            return inner
        if word[0] == '"':
            return word[1:-1]
        if word.isdigit():
            return int(word)
        first, *fields = word.split(".")
        value = variables[first] if first else dot
        for field in fields:
            value = value[field]
        return value

    def call() -> Any:
        if words[0] not in _FUNCTIONS:
            return operand()
        function, arguments = _FUNCTIONS[words.pop(0)], []
        while words and words[0] != ")":
            arguments.append(operand())
        return function(*arguments)

    return call()
