"""A run that is asked to end does so after the step that is under way: by SIGTERM, which schedulers send before they
take a machine away; or by Ctrl-C, where there is something to be saved first."""

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
        self.asked_by: int | None = None

    def __bool__(self) -> bool:
        return self.asked_by is not None

    def obey(self) -> None:
        """Ends as the signal would have."""
        if self.asked_by == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked_by == signal.SIGTERM:
            raise SystemExit(TERMINATED)


@contextlib.contextmanager
def terminable(interrupts: bool) -> Iterator[Ending]:
    """Within it, SIGTERM (and with `interrupts` the first Ctrl-C) is noted instead of obeyed at once. (Python lets the
    main thread alone ask for that.)"""
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending
        return

    def note(number: int, frame: FrameType | None) -> None:
        ending.asked_by = number
        if number == signal.SIGINT:
            log.warning("interrupted: the run ends after this step, and is saved. Once more ends it at once.")
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        else:
            log.warning("asked to terminate: the run ends after this step.")

    noted = (signal.SIGTERM, signal.SIGINT) if interrupts else (signal.SIGTERM,)
    before = {number: signal.signal(number, note) for number in noted}
    try:
        yield ending
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
