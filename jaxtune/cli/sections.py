"""The options of a command, in sections that are taken from what they are options of: as options of a command line, and
as a file. A name is an option of the first section that has it; later ones keep their default."""

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from jaxtune.cli import values
from jaxtune.cli.declared import REQUIRED, Declared, Option

Values = dict[str, Any]
"""By the options' names."""


@dataclasses.dataclass(frozen=True)
class Section:
    name: str
    declared: Declared
    omitted: frozenset[str]
    """What an earlier section has, or the command itself knows."""

    @functools.cached_property
    def options(self) -> dict[str, Option]:
        """Those that can be written as text. One without a default is null until it is filled in."""
        own = self.declared.options.items()
        return {
            name: dataclasses.replace(option, annotation=f"{option.annotation} | None", default=None)
            if option.default is REQUIRED
            else option
            for name, option in own
            if name not in self.omitted and values.can_be_written(option.type)
        }

    def of(self, given: Mapping[str, Any]) -> Values:
        """What of a run's values belongs here."""
        return {name: given[name] for name in self.options}


def sections(known: Sequence[str] = (), **declared: Declared) -> tuple[Section, ...]:
    """By their names, in this order; `known` are arguments that the command gives itself."""
    made: list[Section] = []
    taken = set(known)
    for name, each in declared.items():
        made.append(Section(name, each, frozenset(taken)))
        taken |= set(each.options)
    return tuple(made)


def defaults(among: Sequence[Section]) -> Values:
    return {name: option.default for section in among for name, option in section.options.items()}


def options_type(among: Sequence[Section], default: Mapping[str, Any]) -> type:
    """A dataclass of dataclasses from which tyro makes the command line; `default` goes before what is declared."""
    groups = [(section.name, _group(section, default)) for section in among]
    return dataclasses.make_dataclass(
        "Options", [(name, group, dataclasses.field(default_factory=group)) for name, group in groups]
    )


def parsed(options: Any) -> Values:
    """What tyro made of an `options_type`, flat."""
    return {name: value for section in vars(options).values() for name, value in vars(section).items()}


def as_file(among: Sequence[Section], given: Mapping[str, Any]) -> str:
    """YAML with a value for every option, which `run_file.read` reads back."""
    return "".join(
        f"{section.name}:\n" + "".join(f"  {name}: {values.write(given[name])}\n" for name in section.options)
        for section in among
    )


def _group(section: Section, default: Mapping[str, Any]) -> type:
    fields = []
    for name, option in section.options.items():
        spec = PrimitiveConstructorSpec(
            nargs="*",
            metavar="|".join(word.split()[-1].upper() for word in values.words(option.type)),
            instance_from_str=functools.partial(_read_words, option),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [value if isinstance(value, str) else values.write(value)],
        )
        annotation = Annotated[Any, spec, tyro.conf.arg(help=option.meaning or " ")]
        value = functools.partial(copy.copy, default.get(name, option.default))
        fields.append((name, annotation, dataclasses.field(default_factory=value)))
    made = dataclasses.make_dataclass(section.name.capitalize(), fields)
    made.__doc__ = section.declared.title
    return made


def _read_words(option: Option, said: Sequence[str]) -> Any:
    try:
        return values.read_words(said, option.type)
    except values.Unreadable as error:
        raise ValueError(str(error)) from None  # which tyro shows, with the option
