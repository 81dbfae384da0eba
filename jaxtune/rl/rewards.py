"""Reward functions, called by TRL's convention and checked: what they raise or return wrongly is a `RewardError` that
names the function.

    def shorter(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

gets everything by keyword, a value for each completion: `answer` stands for any other column of the dataset. In
conversational data a prompt is a list of messages, and so is a completion: `completion[0]["content"]`. None (or NaN)
means that the function has nothing to say about a completion.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxtune.errors import OptionError, TrainingError


class RewardError(TrainingError):
    """A reward function that raised, or whose result is not one number (or None) for each completion."""


RewardFunction = Callable[..., Sequence[float | None]]


def named(reward_funcs: RewardFunction | Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    """One function or several -> by name, as metrics will call them."""
    functions: Sequence[Any] = [reward_funcs]
    if isinstance(reward_funcs, list | tuple) and reward_funcs:
        functions = reward_funcs
    found: dict[str, RewardFunction] = {}
    for function in functions:
        if not callable(function) or inspect.iscoroutinefunction(function):
            raise OptionError(
                f"reward_funcs holds {function!r}.",
                expected="functions that take completions by keyword and return a list of numbers.",
                fix="Pass such a function; reward models and async functions are not supported yet.",
            )
        name = _name(function)
        if name in found:
            raise OptionError(
                f"Two reward functions are named {name!r}.",
                expected="a name for each, under which its rewards are logged.",
                fix="Define them with `def`, or set their `__name__`.",
            )
        found[name] = function
    return found


def score(
    functions: Mapping[str, RewardFunction], given: Mapping[str, Any], num_completions: int
) -> np.ndarray:
    """Rewards [S, F], NaN where a function had no answer. `given` is what functions may take by keyword."""
    columns = [_call(name, function, given, num_completions) for name, function in functions.items()]
    return np.asarray(columns, np.float32).T


def _call(name: str, function: RewardFunction, given: Mapping[str, Any], count: int) -> list[float]:
    try:
        result = function(**_accepted(function, given))
    except Exception as error:  # a user's program: it may raise anything
        raise RewardError(
            f"The reward function {name!r} raised {type(error).__name__}: {error}",
            expected="a reward for every completion, whatever the model has written.",
            fix="Look at the traceback above; return None for what cannot be judged.",
        ) from error
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
        raise _bad_result(name, f"a {type(result).__name__}", count)
    if len(result) != count:
        raise _bad_result(name, f"{len(result)} values for {count} completions", count)
    return [_number(name, value, count) for value in result]


def _accepted(function: RewardFunction, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without `**kwargs`, a function gets what it names."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def _number(name: str, value: Any, count: int) -> float:
    if value is None:
        return math.nan
    try:
        number = math.inf if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.inf
    if math.isinf(number):
        raise _bad_result(name, f"{value!r} among its values", count)
    return number


def _bad_result(name: str, what: str, count: int) -> RewardError:
    return RewardError(
        f"The reward function {name!r} returned {what}.",
        expected=f"a list with one finite number, or None, for each of the {count} completions.",
        fix="Correct what the function returns.",
    )


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # of a functools.partial
    return getattr(function, "__name__", type(function).__name__)
