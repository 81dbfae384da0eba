"""Reward functions, called by TRL's convention and checked: what they raise or return wrongly is a `RewardError` that
names the function.

    def shorter(prompts, completions, completion_ids, answer, **kwargs) -> list[float | None]

gets everything by keyword, a value for each completion: `answer` stands for any other column of the dataset. In
conversational data a prompt is a list of messages, and so is a completion: `completion[0]["content"]`. None (or NaN)
means that the function has nothing to say about a completion. There are also `trainer_state` (see `TrainerState`),
`log_metric(name, value)`, which adds a number to the log, and `log_extra(column, values)`, which adds a column to the
table of completions. Async functions run together.
"""

import asyncio
import functools
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import OptionError, RewardError, nearest

RewardFunction = Callable[..., Any]
"""Returns a list of numbers and None, or a coroutine that does."""


BY_THE_TRAINER = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every reward function may take besides the dataset's columns."""
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class TrainerState(NamedTuple):
    """What a reward function may want to know of the run."""

    global_step: int
    """Optimizer steps before these completions."""
    max_steps: int
    epoch: float


class RewardFunctions:
    """One function or several, by the names under which metrics have them."""

    def __init__(self, given: RewardFunction | Sequence[RewardFunction]):
        self.by_name = _named(given)
        self.names = list(self.by_name)
        self._loop: asyncio.AbstractEventLoop | None = None

    def require(self, columns: Collection[str]) -> None:
        """Raises if a function needs something by name that is neither `given` by the trainer nor a column."""
        for name, function in self.by_name.items():
            for parameter in _parameters(function):
                needed = parameter.default is parameter.empty and parameter.kind in _BY_NAME
                known = (*columns, *BY_THE_TRAINER)
                if needed and parameter.name not in known:
                    raise OptionError(
                        f"The reward function {name!r} takes {parameter.name!r}, which the dataset does not have.",
                        expected=f"one of {', '.join(known)}.",
                        fix=f"Correct the name, or give it a default.{nearest(parameter.name, known)}",
                    )

    def score(self, given: Mapping[str, Any], num_completions: int) -> np.ndarray:
        """Rewards [S, F], NaN where a function had no answer. `given` is what functions may take by keyword."""
        results: dict[str, Any] = dict.fromkeys(self.names)
        later = {}
        for name, function in self.by_name.items():
            call = functools.partial(function, **_accepted(function, given))
            if _is_async(function):
                later[name] = call
            else:
                results[name] = _called(name, call)
        if later:
            results.update(self._together(later))
        columns = [_checked(name, result, num_completions) for name, result in results.items()]
        rewards_SF = np.asarray(columns, np.float32).T
        if np.isnan(rewards_SF).all():
            raise RewardError(
                f"No reward function ({', '.join(self.names)}) had a number for any of {num_completions} "
                "completions: each returned None or NaN for all.",
                expected="a number for some of them: without one there is nothing to learn.",
                fix="Print what the functions are given: completions, and the columns of the dataset.",
            )
        return rewards_SF

    def _together(self, calls: Mapping[str, Callable]) -> Mapping[str, Any]:
        async def one(name: str, call: Callable) -> Any:
            try:
                return await call()
            except Exception as error:  # a user's program: it may raise anything
                raise _raised(name, error) from error

        async def every() -> list[Any]:
            tasks = [asyncio.ensure_future(one(name, call)) for name, call in calls.items()]
            try:
                return await asyncio.gather(*tasks)
            finally:  # where one has failed, the others stop
                for task in tasks:
                    task.cancel()

        if self._loop is None:  # one for every step, so that what a function keeps open stays usable
            self._loop = _loop_in_a_thread()
            weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
        running = asyncio.run_coroutine_threadsafe(every(), self._loop)
        try:
            return dict(zip(calls, running.result(), strict=True))
        finally:
            running.cancel()  # after an interrupt; otherwise it is done


def _loop_in_a_thread() -> asyncio.AbstractEventLoop:
    """Of its own, since the caller's thread may have a loop that is running, as in a notebook."""
    loop = asyncio.new_event_loop()

    def serve() -> None:
        loop.run_forever()
        loop.close()

    threading.Thread(target=serve, name="jaxtune-rewards", daemon=True).start()
    return loop


def _named(given: RewardFunction | Sequence[RewardFunction]) -> dict[str, RewardFunction]:
    functions: Sequence[Any] = given if isinstance(given, list | tuple) and given else [given]
    found: dict[str, RewardFunction] = {}
    for function in functions:
        if not callable(function):
            raise OptionError(
                f"reward_funcs holds {function!r}.",
                expected="functions that take completions by keyword and return a list of numbers.",
                fix="Pass such a function; reward models are not supported yet.",
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


def _name(function: Any) -> str:
    function = getattr(function, "func", function)  # of a functools.partial
    return getattr(function, "__name__", type(function).__name__)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004  # of an object: is calling it a coroutine?
    )


def _accepted(function: RewardFunction, given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without `**kwargs`, a function gets what it names."""
    parameters = _parameters(function)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return given
    return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}


def _parameters(function: RewardFunction) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # of a builtin, which does not say
        return [inspect.Parameter("given", inspect.Parameter.VAR_KEYWORD)]


def _called(name: str, call: Callable) -> Any:
    try:
        return call()
    except Exception as error:  # a user's program: it may raise anything
        raise _raised(name, error) from error


def _raised(name: str, error: Exception) -> RewardError:
    return RewardError(
        f"The reward function {name!r} raised {type(error).__name__}: {error}",
        expected="a reward for every completion, whatever the model has written.",
        fix="Look at the traceback above; return None for what cannot be judged.",
    )


def _checked(name: str, result: Any, count: int) -> list[float]:
    if isinstance(result, str | bytes | Mapping) or not hasattr(result, "__len__"):
        raise _bad_result(name, f"a {type(result).__name__}", count)
    if len(result) != count:
        raise _bad_result(name, f"{len(result)} values for {count} completions", count)
    return [_number(name, value, count) for value in result]


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
