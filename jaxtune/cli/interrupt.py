"""Ctrl-C in a run from the command line: the first ends it after the step that is under way, saved; the second at
once."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jaxtune.log import get_logger
from jaxtune.training import TrainerCallback

log = get_logger(__name__)


class Interrupt(TrainerCallback):
    asked = False

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Within it, the first Ctrl-C is noted instead of raised."""

        def note(number: int, frame: FrameType | None) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            log.warning("Ctrl-C: the run ends after this step, saved; once more, and it ends at once.")
            self.asked = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True
