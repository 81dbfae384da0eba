"""Every error that jaxtune raises on purpose: one type per kind of mistake, each saying what was found, what was
expected and what to do. Catch `JaxtuneError` for all of them."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class JaxtuneError(Exception):
    """The base of all typed errors. `found`, `expected` and `fix` are whole sentences, also kept as attributes."""

    def __init__(self, found: str, *, expected: str, fix: str):
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(found, expected, fix)

    def __str__(self) -> str:
        return f"{self.found}\n  expected: {self.expected}\n  what to do: {self.fix}"


class ModelNotFoundError(JaxtuneError):
    """A folder that is not there, or a hub id that cannot be reached (offline, unknown, gated)."""


class ConfigError(JaxtuneError):
    """A config.json that is absent, unreadable or contradicts itself."""


class UnsupportedModelError(ConfigError):
    """A `model_type` (or a feature of a known one) that jaxtune has no definition for."""


class CheckpointError(JaxtuneError):
    """Weight files that are missing, truncated, pickled, incomplete, misshapen or not finite."""


class DatasetError(JaxtuneError):
    """A dataset without the needed column, with rows of the wrong form, or that leaves no token to train on."""


class ChatTemplateError(JaxtuneError):
    """A tokenizer without a chat template, or a template that is unknown or cannot be rendered."""


class DeviceMemoryError(JaxtuneError):
    """A device without room for the model."""


class AdapterError(JaxtuneError):
    """A LoRA configuration or adapter folder that does not fit the model."""


class OutputFolderError(JaxtuneError):
    """A folder to write to that exists and holds something that is not ours, or that cannot be written."""


class ExportError(JaxtuneError):
    """What was written, read back, is not what was to be written."""


class HubError(JaxtuneError):
    """A push that the hub refused, or that broke off."""


class OptionError(JaxtuneError, ValueError):
    """An option that does not exist, or a value that it cannot take."""


class ShardingError(JaxtuneError):
    """A mesh that the devices cannot form, or over which a weight cannot be cut."""


class TrainingError(JaxtuneError):
    """A run that cannot go on: a loss that is not finite, a batch that cannot be formed."""


class DivergenceError(TrainingError):
    """A loss or a gradient that is not finite: what was learnt last is worth nothing."""


class RewardError(TrainingError):
    """A reward function that raised, whose result is not one number (or None) for each completion, or that had nothing
    to say about any of them."""


@contextlib.contextmanager
def within(place: str) -> Iterator[None]:
    """Errors that are raised inside begin with the place."""
    try:
        yield
    except JaxtuneError as error:
        error.found = f"{place}: {error.found}"
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x' or 'y'?"` for a mistyped name, or an empty string. Goes at the end of a `fix`."""
    close = difflib.get_close_matches(name, list(known), n=3)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
