"""A run as a YAML file: options by their names, in their sections or without any. What is wrong in it is an error that
names the line."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from jaxtune.cli import values
from jaxtune.cli.declared import Option
from jaxtune.cli.sections import Section, Values
from jaxtune.errors import JaxtuneError, OptionError, nearest
from jaxtune.options import accept


@dataclasses.dataclass(frozen=True)
class RunFile:
    path: Path
    values: Values
    lines: Mapping[str, int]
    """Where each value stands."""

    def locate(self, error: JaxtuneError, used: Mapping[str, Any]) -> JaxtuneError:
        """The same error, with the line of each option that it names, if its value is still the file's."""
        lines = [
            f"line {line}"
            for name, line in self.lines.items()
            if re.search(rf"\b{name}=", error.found) and used[name] == self.values[name]
        ]
        if not lines:
            return error
        found = f"{' and '.join(lines)} of {self.path}: {error.found}"
        return type(error)(found, expected=error.expected, fix=error.fix)


def read(path: Path, among: Sequence[Section]) -> RunFile:
    found: Values = {}
    lines: dict[str, int] = {}
    for key, node, section in _entries(path, among):
        given, line = key.value, key.start_mark.line + 1
        option = _named(given, [section] if section else among)
        if option is None:
            _let_pass(given, node, section, among, f"line {line} of {path}")
            continue
        name = option.name
        if name in found:
            _refuse(
                f"line {line} of {path}: {name} once more; line {lines[name]} has it already.",
                "every option once.",
                "Remove one of the two lines.",
            )
        try:
            found[name] = values.read(node, option.type)
        except values.Unreadable as error:
            _refuse(
                f"line {error.line} of {path}: {given} is {error.found}.",
                f"{error.expected}.",
                f"Correct {given}, or leave it out.",
            )
        except RecursionError:
            _refuse(f"line {line} of {path}: {given} is a part of itself.", "a value.", f"Correct {given}.")
        lines[name] = line
    return RunFile(path, found, lines)


def _entries(path: Path, among: Sequence[Section]) -> Iterator[tuple[yaml.Node, yaml.Node, Section | None]]:
    """(name, value, section), whatever the section is written in."""
    by_name = {section.name: section for section in among}
    for key, node in _pairs(_root(path), f"{path} holds"):
        section = by_name.get(key.value)
        if section is None:
            yield key, node, None
            continue
        where = f"line {key.start_mark.line + 1} of {path}: the section {section.name} is"
        is_text = isinstance(node, yaml.ScalarNode) and node.value
        hint = f" Did you mean `{next(iter(section.options))}: {node.value}`?" if is_text else ""
        for inner, value in _pairs(node, where, hint):
            yield inner, value, section


def _root(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        missing = not path.exists()
        _refuse(
            f"there is no file {str(path)!r}." if missing else f"{path} cannot be read: {error}.",
            "a YAML file of a run.",
            "Check the path; `jaxtune sft --print-config > run.yaml` writes such a file."
            + (nearest(path.name, beside) if missing else ""),
        )
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} of {path}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        _refuse(f"{where} is not YAML: {problem}.", "lines such as `learning_rate: 2e-4`.", "Correct it.")


def _pairs(node: yaml.Node | None, what: str, hint: str = "") -> list[tuple[yaml.Node, yaml.Node]]:
    """A mapping's, whose keys are names."""
    strange = node
    if isinstance(node, yaml.MappingNode):
        strange = next((key for key, _ in node.value if not isinstance(key, yaml.ScalarNode)), None)
        if strange is None:
            return node.value
        what += " a mapping in which a name is"
    _refuse(
        f"{what} {values.kind_of(strange)}.",
        "options by their names, such as `learning_rate: 2e-4`; those of a section indented beneath its name.",
        f"Correct the file; `jaxtune sft --print-config` shows what one looks like.{hint}",
    )


def _named(name: str, among: Sequence[Section]) -> Option | None:
    """The option of that name, or of that alias."""
    own = (section.options[name] for section in among if name in section.options)
    other = (
        section.options[alias]
        for section in among
        if (alias := section.declared.aliases.get(name)) in section.options
    )
    return next(own, None) or next(other, None)


def _let_pass(
    name: str, node: yaml.Node, section: Section | None, among: Sequence[Section], where: str
) -> None:
    """A name without effect, that is; any other is refused."""
    for each in [section] if section else among:
        if name in each.declared.without_effect:
            try:
                accept(each.declared.title, name, values.read(node, Any), each.declared.without_effect[name])
            except OptionError as error:
                _refuse(f"{where}: {error.found}", error.expected, error.fix)
            return
    home = next((each.name for each in among if name in each.options), None)
    known = {option for each in among for option in each.options} | {each.name for each in among}
    _refuse(
        f"{where}: there is no option {name!r}{f' in the section {section.name}' if section else ''}.",
        "an option that `jaxtune sft --help` lists.",
        f"Put it in the section {home}."
        if home
        else f"Correct the name, or leave it out.{nearest(name, known)}",
    )


def _refuse(found: str, expected: str, fix: str) -> NoReturn:
    raise OptionError(found, expected=expected, fix=fix) from None
