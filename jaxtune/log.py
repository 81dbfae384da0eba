"""The one logging style: `log = get_logger(__name__)`, under the logger "jaxtune", silent below INFO, no handler
until `show()` (which the command line and the trainer call) or until the user configures logging."""

import logging
import sys


def get_logger(name: str) -> logging.Logger:
    return logging.getLogger(name)


def counted(number: int, what: str) -> str:
    """1, "step" -> "1 step"; 2, "step" -> "2 steps"."""
    return f"{number} {what}" + "s" * (number != 1)


def show(level: int = logging.INFO) -> None:
    """Prints jaxtune's messages to stderr as `jaxtune: message`, unless the user has configured a handler already."""
    root = logging.getLogger("jaxtune")
    if not root.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("jaxtune: %(message)s"))
        root.addHandler(handler)
        # Or lines come twice once another library gives Python's own root logger a handler, as absl does.
        root.propagate = False
    if root.level == logging.NOTSET or root.level > level:
        root.setLevel(level)
