"""Options as the sources declare them: a dataclass' fields, the arguments of a function (or of a class, by its
constructor), and what `mirrors` says beside them. Sources are read, not imported: what is made of these options, a
command line and a table, is there before jax could be."""

import ast
import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtune.options

PACKAGE = Path(jaxtune.options.__file__).parent
REQUIRED = object()
"""The default of an option that has none."""
DOCUMENTED_IN = {
    "FastLanguageModel.get_peft_model": ("jaxtune.lora.config", "LoraConfig"),
    "Pushable.push_to_hub": ("jaxtune.export.hub", "Push"),
    "Pushable.push_to_hub_ggml": ("jaxtune.export.hub", "Push"),
    "Pushable.push_to_hub_gguf": ("jaxtune.export.hub", "Push"),
    "Pushable.push_to_hub_merged": ("jaxtune.export.hub", "Push"),
}
"""Where else a meaning may be found, by the option's name."""


@dataclasses.dataclass(frozen=True)
class Option:
    name: str
    annotation: str
    """As it is written."""
    default: Any
    meaning: str
    module: str

    @functools.cached_property
    def type(self) -> Any:
        """The annotation, evaluated."""
        return _module(self.module).evaluate(ast.parse(self.annotation, mode="eval").body)


@dataclasses.dataclass(frozen=True)
class Declared:
    title: str
    """As errors call it: SFTConfig, FastLanguageModel.from_pretrained."""
    summary: str
    """The first paragraph of what it says of itself."""
    options: dict[str, Option]
    aliases: dict[str, str]
    """Other libraries' names, each with ours."""
    without_effect: dict[str, Any]
    """As `mirrors` takes it."""


@functools.cache
def read(module: str, title: str) -> Declared:
    return _module(module).declared(title)


def read_all() -> list[Declared]:
    """Whatever `mirrors` decorates, by title."""
    found = [
        read(module, title)
        for path in sorted(PACKAGE.rglob("*.py"))
        if "@mirrors(" in path.read_text(encoding="utf-8")
        for module in [".".join(("jaxtune", *path.relative_to(PACKAGE).with_suffix("").parts))]
        for title in _module(module).mirrored()
    ]
    return sorted(found, key=lambda declared: declared.title)


@functools.cache
def _module(name: str) -> "_Module":
    path = PACKAGE.joinpath(*name.split(".")[1:])
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _Module(name, ast.parse(file.read_text(encoding="utf-8")))


class _Module:
    """What a source says its names mean."""

    def __init__(self, name: str, tree: ast.Module):
        self.name = name
        self.where = {name: statement for statement in tree.body for name in _names_of(statement)}

    def mirrored(self) -> Iterator[str]:
        for name, statement in self.where.items():
            if isinstance(statement, ast.ClassDef):
                inner = [each for each in statement.body if isinstance(each, ast.FunctionDef)]
                yield from (f"{name}.{each.name}" for each in inner if _mirrors(each) is not None)
            if isinstance(statement, ast.ClassDef | ast.FunctionDef) and _mirrors(statement) is not None:
                yield name

    def declared(self, title: str) -> Declared:
        node = self._definition(title)
        if isinstance(node, ast.FunctionDef):
            options = self._arguments(node)
        elif any(re.match(r"(dataclasses\.)?dataclass\b", ast.unparse(each)) for each in node.decorator_list):
            options = self._fields(node)
        else:
            options = self._arguments(self._definition(f"{title}.__init__"))
        if title in DOCUMENTED_IN:
            documented = read(*DOCUMENTED_IN[title]).options
            options = {
                name: dataclasses.replace(option, meaning=documented[name].meaning)
                if name in documented and not option.meaning
                else option
                for name, option in options.items()
            }
        mirrored = {name: self.evaluate(value) for name, value in (_mirrors(node) or {}).items()}
        others = mirrored.get("without_effect", {})
        without_effect = {name: neutral for name, neutral in others.items() if name not in options}
        summary = (ast.get_docstring(node) or "").split("\n\n")[0]
        return Declared(
            title, " ".join(summary.split()), options, mirrored.get("aliases", {}), without_effect
        )

    def _definition(self, title: str) -> Any:
        first, *rest = title.split(".")
        node: Any = self.where[first]
        for name in rest:
            node = next(each for each in node.body if getattr(each, "name", None) == name)
        return node

    def _fields(self, node: ast.ClassDef) -> dict[str, Option]:
        """A dataclass', with those of its bases first."""
        options: dict[str, Option] = {}
        for base in node.bases:
            module, definition = self._class(ast.unparse(base))
            options |= module._fields(definition)
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = REQUIRED if field.value is None else self.evaluate(field.value)
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                meaning = str(after.value.value) if documented else ""  # type: ignore[union-attr]
                options[field.target.id] = self._option(field.target.id, field.annotation, value, meaning)
        return options

    def _arguments(self, node: ast.FunctionDef) -> dict[str, Option]:
        given = node.args
        positional = given.posonlyargs + given.args
        without = [None] * (len(positional) - len(given.defaults))
        pairs = [*zip(positional, [*without, *given.defaults], strict=True)]
        pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
        meanings = _meanings(ast.get_docstring(node) or "")
        return {
            each.arg: self._option(
                each.arg,
                each.annotation,
                REQUIRED if default is None else self.evaluate(default),
                meanings.get(each.arg, ""),
            )
            for each, default in pairs
            if each.arg != "self"
        }

    def _option(self, name: str, annotation: ast.expr | None, default: Any, meaning: str) -> Option:
        written = "Any" if annotation is None else ast.unparse(annotation)
        return Option(name, written, default, " ".join(inspect.cleandoc(meaning).split()), self.name)

    def evaluate(self, node: ast.expr) -> Any:
        """An expression's value."""
        return eval(ast.unparse(node), self._names_in(node))

    def _names_in(self, node: ast.AST) -> dict[str, Any]:
        """What the names mean that it uses."""
        used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        return {name: self._value(name) for name in used if name in self.where}

    def _value(self, name: str) -> Any:
        """Of our own modules, only those are imported that are already, and those that define a class."""
        statement = self.where[name]
        if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
            return self.evaluate(statement.value)
        if isinstance(statement, ast.FunctionDef):
            names = self._names_in(statement)
            exec(ast.unparse(statement), names)
            return names[name]
        if isinstance(statement, ast.Import):
            return importlib.import_module(_origin(statement, name))
        if isinstance(statement, ast.ImportFrom):
            module, there = str(statement.module), _origin(statement, name)
            if not module.startswith("jaxtune.") or module in sys.modules:
                return getattr(importlib.import_module(module), there)
            return _module(module)._value(there)
        return getattr(importlib.import_module(self.name), name)

    def _class(self, name: str) -> tuple["_Module", Any]:
        """A class, and the module that defines it."""
        statement = self.where[name]
        if isinstance(statement, ast.ImportFrom):
            return _module(str(statement.module))._class(_origin(statement, name))
        return self, statement


def _names_of(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.Import() | ast.ImportFrom():
            return [each.asname or each.name.split(".")[0] for each in statement.names]
        case ast.ClassDef() | ast.FunctionDef():
            return [statement.name]
        case ast.Assign():
            return [each.id for each in statement.targets if isinstance(each, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def _origin(statement: ast.Import | ast.ImportFrom, name: str) -> str:
    """What a name is called where it is imported from."""
    return next((each.name for each in statement.names if each.asname == name), name)


def _mirrors(node: ast.ClassDef | ast.FunctionDef) -> dict[str, ast.expr] | None:
    """What `mirrors` is given, if it decorates this."""
    for each in node.decorator_list:
        if isinstance(each, ast.Call) and ast.unparse(each.func) == "mirrors":
            by_place = dict(zip(("without_effect", "aliases"), each.args, strict=False))
            return by_place | {str(keyword.arg): keyword.value for keyword in each.keywords}
    return None


def _meanings(docstring: str) -> dict[str, str]:
    """What the section `Args:` says, by name."""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", docstring, re.M | re.S)
    entries = re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1] if section else "", re.M | re.S)
    return dict(entries)
