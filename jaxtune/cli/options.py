"""`jaxtune options`: every option of what mirrors another library, as Markdown. docs/options.md is what it prints."""

from collections.abc import Iterable, Iterator
from typing import Annotated

import tyro

from jaxtune.cli import declared
from jaxtune.cli.declared import REQUIRED, Declared, Option
from jaxtune.errors import OptionError, nearest
from jaxtune.options import ANY

HEAD = """# Options

Printed by `jaxtune options`, from the sources; `jaxtune options SFTConfig` prints those of one name.
"""


def options(name: Annotated[str | None, tyro.conf.Positional] = None) -> int:
    """Lists the options of configs, trainers and methods, with their defaults.

    Args:
        name: Whose: SFTConfig, or FastLanguageModel.from_pretrained. All, if it is left out.

    Returns:
        0.
    """
    found = {each.title: each for each in declared.read_all()}
    if name is None:
        print("\n".join((HEAD, *map(table, found.values()))), end="")
        return 0
    by_last_part = {title.split(".")[-1]: title for title in found}
    title = by_last_part.get(name, name)
    if title not in found:
        raise OptionError(
            f"nothing is called {name!r}.",
            expected=f"one of {', '.join(found)}.",
            fix=f"Correct it, or leave it out.{nearest(name, {*found, *by_last_part})}",
        )
    print(table(found[title]), end="")
    return 0


def table(each: Declared) -> str:
    return "\n\n".join(_paragraphs(each)) + "\n"


def _paragraphs(each: Declared) -> Iterator[str]:
    yield f"## {each.title}"
    if each.summary:
        yield each.summary
    yield "\n".join(("| option | default | meaning |", "|---|---|---|", *map(_row, each.options.values())))
    if each.aliases:
        yield f"Other names: {_list(f'`{other}` for `{name}`' for other, name in each.aliases.items())}."
    free = [name for name, neutral in each.without_effect.items() if neutral is ANY]
    if free:
        yield f"Accepted, without effect: {_list(f'`{name}`' for name in free)}."
    bound = {name: neutral for name, neutral in each.without_effect.items() if neutral is not ANY}
    if bound:
        yield f"Accepted with this value only: {_list(f'`{name}={_or(bound[name])}`' for name in bound)}."


def _row(option: Option) -> str:
    default = "required" if option.default is REQUIRED else f"`{option.default!r}`"
    return f"| `{option.name}` | {default} | {option.meaning.replace('|', '\\|')} |"


def _or(neutral: object) -> str:
    return " or ".join(map(repr, neutral if isinstance(neutral, tuple) else (neutral,)))


def _list(items: Iterable[str]) -> str:
    return ", ".join(items)
