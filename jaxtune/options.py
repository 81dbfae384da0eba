"""Keyword options of functions and configs that mirror another library's: what we have, what has no meaning here, and
what is a mistake. A name without effect is accepted with one line; any other unknown name raises and suggests."""

import functools
import inspect
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jaxtune.errors import OptionError, nearest
from jaxtune.log import get_logger, show

log = get_logger(__name__)
F = TypeVar("F", bound=Callable[..., Any])

ANY = object()
"""In `without_effect`: every value of the option is accepted."""
NOT_YET = (None,)
"""In `without_effect`: a name that means something, which is not built yet; left out, or None."""


def mirrors(without_effect: Mapping[str, Any], aliases: Mapping[str, str] | None = None) -> Callable[[F], F]:
    """Decorates a function, or a class by its constructor, that has named keyword options. `without_effect` gives names
    that callers may pass although they mean nothing here: with `ANY`, or with the one value (or tuple of values) that
    changes nothing. `aliases` gives other libraries' names for our own."""

    def decorate(function: F) -> F:
        if inspect.isclass(function):
            function.__init__ = decorate(function.__init__)  # type: ignore[method-assign]
            return function
        own = list(inspect.signature(function).parameters)
        title = function.__qualname__.removesuffix(".__init__")

        @functools.wraps(function)
        def wrapper(*args, **given):
            for other, name in (aliases or {}).items():
                if other in given:
                    given[name] = given.pop(other)
            for name in [name for name in given if name not in own]:
                if name not in without_effect:
                    raise _unknown(title, name, [*own, *(aliases or ()), *without_effect])
                accept(title, name, given.pop(name), without_effect[name])
            return function(*args, **given)

        return wrapper  # type: ignore[return-value]

    return decorate


def accept(title: str, name: str, value: Any, neutral: Any) -> None:
    """Lets a name without effect pass if its value may; `neutral` is what `without_effect` has for it."""
    neutral_values = neutral if isinstance(neutral, tuple) else (neutral,)
    if neutral is ANY:
        show()
        log.info("%s: %s has no effect in jaxtune.", title, name)
    elif value not in neutral_values:
        raise OptionError(
            f"{title} was given {name}={reprlib.repr(value)}, which this version does not support.",
            expected=f"{name}={' or '.join(map(repr, neutral_values))}.",
            fix=f"Leave {name} out.",
        )


def _unknown(title: str, name: str, known: Iterable[str]) -> OptionError:
    return OptionError(
        f"{title} has no option {name!r}.",
        expected=f"one of those that `jaxtune options {title}` lists.",
        fix=f"Correct the name, or leave it out.{nearest(name, [each for each in known if each != 'self'])}",
    )
