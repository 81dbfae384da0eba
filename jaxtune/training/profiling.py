"""A stretch of a run under jax's profiler."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from jaxtune.errors import OptionError
from jaxtune.log import get_logger

log = get_logger(__name__)

FOLDER = "profile"


class Profiler:
    """A context manager around a run of `total_steps`. `steps` are the first and the last that are traced."""

    def __init__(self, steps: Sequence[int] | None, output_dir: str | Path | None, total_steps: int):
        self.steps, self.is_tracing = steps, False
        self.folder = Path(output_dir or ".") / FOLDER
        if steps is not None and steps[0] > total_steps:
            raise OptionError(
                f"profile_steps={tuple(steps)} of a run of {total_steps} steps.",
                expected="steps that the run has.",
                fix="Lower profile_steps.",
            )

    def after_step(self, done: int, settle: Callable[[], None]) -> None:
        """Begins before the first of them is dispatched, and ends once the last is done, which `settle` waits for."""
        if self.steps is None:
            return
        first, last = self.steps
        if self.is_tracing and done >= last:
            settle()
            self._stop()
        elif not self.is_tracing and first - 1 <= done < last:
            settle()
            jax.profiler.start_trace(self.folder)
            self.is_tracing = True

    def _stop(self) -> None:
        if self.is_tracing:
            self.is_tracing = False
            jax.profiler.stop_trace()
            log.info(
                "the profile is in %s (TensorBoard with its profile plugin, or xprof, shows it)", self.folder
            )

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
