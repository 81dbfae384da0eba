"""As much of Go's text/template as our Modelfiles use, and the data that Ollama gives it.

Go itself is no dependency of the tests. Where there is one, `compare_with_go.py` has it render every case of
test_ollama.py too. What is not known here is an error, as is a field that Ollama's data do not have.
"""

import json
import re
from collections import ChainMap
from collections.abc import Iterator
from datetime import date
from typing import Any

# What Ollama's data hold, besides what a request says.
_MESSAGE = {"Role": "", "Content": "", "Thinking": "", "ToolCalls": [], "ToolName": ""}
_NOTHING_ASKED = {"Tools": [], "Think": False, "ThinkLevel": "", "IsThinkSet": False}


def render(template: str, messages: list[dict[str, Any]], **asked: Any) -> str:
    """The prompt of a conversation. `asked`: Tools, Think, ThinkLevel and IsThinkSet of a request."""
    return _execute(template, data_of(messages, **asked))


def data_of(messages: list[dict[str, Any]], **asked: Any) -> dict[str, Any]:
    """As Ollama has them: neighbours of one role are one message, those of tools apart."""
    merged: list[dict[str, Any]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"] != "tool":
            merged[-1]["Content"] += "\n\n" + message["content"]
            continue
        calls = [call["function"] for call in message.get("tool_calls", [])]
        merged.append({
            **_MESSAGE,
            "Role": message["role"],
            "Content": message["content"],
            "Thinking": message.get("thinking", ""),
            "ToolCalls": [{"Function": {"Name": c["name"], "Arguments": _in_order(c["arguments"])}} for c in calls],
        })  # fmt: skip
    systems = [message["content"] for message in messages if message["role"] == "system"]
    return {"Messages": merged, "System": "\n\n".join(systems), "Response": "", **_NOTHING_ASKED, **asked}


def _in_order(arguments: dict[str, Any]) -> dict[str, Any]:
    """Go writes the keys of a map so."""
    return dict(sorted(arguments.items()))


def _execute(template: str, data: dict[str, Any]) -> str:
    defined: dict[str, list] = {}
    nodes, _ = _nest(_parts(template), defined)
    printed: list[str] = []
    _Execution(defined, printed).run(nodes, data, ChainMap({"$": data}))
    return "".join(printed)


_STRING = r'"(?:[^"\\]|\\.)*"'
_ACTION = re.compile(rf"\{{\{{(- )?\s*((?:{_STRING}|[^\"])*?)\s*( -)?\}}\}}")
_WORD = re.compile(rf"{_STRING}|[()]|[^\s()]+")


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


def _nest(parts: Iterator[tuple[str, str]], defined: dict[str, list]) -> tuple[list, str]:
    """The nodes up to `end` or `else`, and which of these it was. A block is [kind, header, body, else's body]."""
    nodes: list = []
    for kind, content in parts:
        head, _, rest = content.partition(" ")
        if kind == "text":
            nodes.append([kind, content])
        elif head in ("end", "else"):
            return nodes, content
        elif head == "define":
            defined[json.loads(rest)], _ = _nest(parts, defined)
        elif head in ("range", "if"):
            body, ended_by = _nest(parts, defined)
            nodes.append([head, rest, body, _otherwise(ended_by, parts, defined)])
        else:
            nodes.append([kind, content])
    return nodes, "the end of the text"


def _otherwise(ended_by: str, parts: Iterator[tuple[str, str]], defined: dict[str, list]) -> list:
    if ended_by == "end":
        return []
    if ended_by == "else":
        return _nest(parts, defined)[0]
    kind, condition = ended_by.removeprefix("else ").split(maxsplit=1)  # `else if` shares the one `end`
    assert kind == "if", ended_by
    body, next_end = _nest(parts, defined)
    return [["if", condition, body, _otherwise(next_end, parts, defined)]]


class _Execution:
    def __init__(self, defined: dict[str, list], printed: list[str]) -> None:
        self.defined, self.printed = defined, printed

    def run(self, nodes: list, dot: Any, variables: ChainMap) -> None:
        for kind, content, *bodies in nodes:
            if kind == "text":
                self.printed.append(content)
            elif kind == "if":
                body = bodies[0] if _value(content, dot, variables) else bodies[1]
                self.run(body, dot, variables.new_child())
            elif kind == "range":
                names, _, items = content.rpartition(" := ")
                for i, item in enumerate(_value(items, dot, variables)):
                    inner = dict(zip(names.split(", "), (i, item), strict=True)) if names else {}
                    self.run(bodies[0], item, variables.new_child(inner))
            elif content.startswith("template "):
                _, name, argument = content.split(maxsplit=2)
                item = _value(argument, dot, variables)
                self.run(self.defined[json.loads(name)], item, ChainMap({"$": item}))
            elif " := " in content:
                name, _, expression = content.partition(" := ")
                variables[name] = _value(expression, dot, variables)
            elif " = " in content:
                name, _, expression = content.partition(" = ")
                holder = next(scope for scope in variables.maps if name in scope)
                holder[name] = _value(expression, dot, variables)
            else:
                value = _value(content, dot, variables)
                assert isinstance(value, str), f"{content} is {value!r}"
                self.printed.append(value)


def go_json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text)


_FUNCTIONS = {
    "eq": lambda first, *others: first in others,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "not": lambda x: not x,
    "len": len,
    "index": lambda items, at: items[at],
    "slice": lambda items, *ends: items[slice(*ends) if len(ends) == 2 else slice(*ends, None)],
    "printf": lambda form, *values: form % values,
    "json": go_json,
    "currentDate": lambda: date.today().isoformat(),
}
"""A text is cut by characters, in Go by bytes: the same where all that is cut off is ASCII."""


def _value(expression: str, dot: Any, variables: ChainMap) -> Any:
    words = _WORD.findall(expression)

    def fields(value: Any, names: list[str]) -> Any:
        for name in names:
            value = value[name]
        return value

    def operand() -> Any:
        word = words.pop(0)
        if word == "(":
            inner = call()
            words.pop(0)
            return fields(inner, words.pop(0)[1:].split(".")) if words and words[0][0] == "." else inner
        if word[0] == '"':
            return json.loads(word)
        if word.isdigit():
            return int(word)
        first, *names = word.split(".")
        return fields(variables[first] if first else dot, [name for name in names if name])

    def call() -> Any:
        name = words[0]
        if name in ("and", "or"):
            return short_circuit(stops_at=name == "or")
        if name not in _FUNCTIONS:
            return operand()
        words.pop(0)
        arguments = []
        while words and words[0] != ")":
            arguments.append(operand())
        return _FUNCTIONS[name](*arguments)

    def short_circuit(stops_at: bool) -> Any:
        """The first that is so or not, else the last; what comes after it is not looked at."""
        words.pop(0)
        value: Any = None
        while words and words[0] != ")":
            value = operand()
            if bool(value) == stops_at:
                skip()
        return value

    def skip() -> None:
        """To the end of the call."""
        depth = 0
        while words and (depth or words[0] != ")"):
            depth += {"(": 1, ")": -1}.get(words.pop(0), 0)

    value = call()
    assert not words, f"{expression}: {words}"
    return value
