"""A run that is asked to end (SIGTERM, which schedulers send before they take a machine away) does so after the step
that is under way."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from jaxtune.log import get_logger

log = get_logger(__name__)

TERMINATED = 128 + signal.SIGTERM
"""The exit status by which a scheduler knows that the run is not finished."""


class Ending:
    """True once the run was asked to end."""

    def __init__(self) -> None:
        self.asked = False

    def __bool__(self) -> bool:
        return self.asked


@contextlib.contextmanager
def terminable() -> Iterator[Ending]:
    """Within it, SIGTERM is noted instead of obeyed at once. (Python lets the main thread alone ask for that.)"""
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def note(number: int, frame: FrameType | None) -> None:
        log.warning("asked to terminate: the run ends after this step.")
        ending.asked = True

    before = signal.signal(signal.SIGTERM, note)
    try:
        yield ending
    finally:
        signal.signal(signal.SIGTERM, before)
