"""A value as it is written, in a file or on the command line, read by the type of its option.

Not by what YAML guesses: `2e-4` is a number and `no` a word wherever the option wants one. Only an option of any type
gets what YAML would make of it.
"""

import collections.abc
import json
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

NULLS = ("null", "Null", "NULL", "~", "", "None")
TRUTHS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_ANY = None | bool | float | list[Any] | dict[str, Any] | str


class Unreadable(Exception):
    """A value, or a part of it, that is none of its type."""

    def __init__(self, node: yaml.Node, type_: Any):
        self.found = kind_of(node)
        self.expected = " or ".join(words(type_))
        self.line = node.start_mark and node.start_mark.line + 1
        super().__init__(f"{self.found} is not {self.expected}")


def kind_of(node: yaml.Node | None) -> str:
    """What an error calls it."""
    if isinstance(node, yaml.SequenceNode | yaml.MappingNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    return f"the text {node.value!r}" if node and node.value else "nothing"


def can_be_written(type_: Any) -> bool:
    """Whether values of this type have a form as text, as functions and models have not."""
    return type_ is Any or all(
        kind in (None, bool, int, float, str, Path) or _is_list(kind) or _is_mapping(kind)
        for kind in _alternatives(type_)
    )


def read(node: yaml.Node, type_: Any) -> Any:
    """What the text says, as one of the type's alternatives: the narrowest that it can be."""
    kinds = _alternatives(_ANY if type_ is Any else type_)
    if isinstance(node, yaml.SequenceNode):
        for kind in filter(_is_list, kinds):
            (each, *_) = typing.get_args(kind) or (Any,)
            return [read(item, each) for item in node.value]
    elif isinstance(node, yaml.MappingNode):
        for kind in filter(_is_mapping, kinds):
            key_type, value_type = typing.get_args(kind) or (Any, Any)
            return {read(key, key_type): read(value, value_type) for key, value in node.value}
    else:
        is_quoted = node.style is not None  # rather a text, then
        for kind, reader in (*_TEXTS, *_PLAIN) if is_quoted else (*_PLAIN, *_TEXTS):
            if kind in kinds:
                try:
                    return reader(node.value)
                except ValueError:
                    continue
    raise Unreadable(node, type_)


def read_words(said: Sequence[str], type_: Any) -> Any:
    """What stands behind an option on the command line: a value, written as in a file, or the items of a list. Nothing
    behind a switch means True."""
    if not said and bool in _alternatives(type_):
        return True
    if len(said) == 1:
        return read(_node(said[0]), type_)
    return read(yaml.SequenceNode(_SEQUENCE, [_plain(word) for word in said]), type_)


def write(value: Any) -> str:
    """The text that reads back as the value: JSON, which is YAML too."""
    return json.dumps(value, ensure_ascii=False, default=str)


def words(type_: Any) -> list[str]:
    """What a value of the type may be: `float | None` -> ["a number", "null"]."""
    return ["any value"] if type_ is Any else [_word(kind) for kind in _alternatives(type_)]


def _node(word: str) -> yaml.Node:
    if word.startswith(("[", "{")):
        try:
            return yaml.compose(word, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            pass  # a regular expression may begin so
    return _plain(word)


def _plain(word: str) -> yaml.Node:
    return yaml.ScalarNode(_SCALAR, word)


def _alternatives(type_: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(type_) in (types.UnionType, typing.Union)
    return tuple(
        None if kind is type(None) else kind for kind in (typing.get_args(type_) if is_union else (type_,))
    )


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) in (list, tuple, collections.abc.Sequence)


def _is_mapping(kind: Any) -> bool:
    return typing.get_origin(kind) in (dict, collections.abc.Mapping)


def _word(kind: Any) -> str:
    if _is_list(kind):
        return "a list"
    if _is_mapping(kind):
        return "a mapping"
    return {
        None: "null",
        bool: "true|false",
        int: "an integer",
        float: "a number",
        Path: "a path",
        str: "a text",
    }[kind]


def _null(text: str) -> None:
    if text not in NULLS:
        raise ValueError


def _truth(text: str) -> bool:
    if text not in TRUTHS:
        raise ValueError
    return TRUTHS[text]


def _number(text: str) -> float:
    """Whole ones stay whole, as they do in Python."""
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


_PLAIN = ((None, _null), (bool, _truth), (int, int), (float, _number))
_TEXTS = ((str, str), (Path, Path))
_SCALAR, _SEQUENCE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"
