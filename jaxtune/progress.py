"""The one progress bar: in a terminal, in a notebook, and silent where nobody looks on."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, disable: bool | None = None, **options: Any) -> tqdm:
    """`disable` is True or False against what is found out."""
    # In a notebook stderr is no terminal, and yet somebody looks on.
    if disable is None and "ipykernel.zmqshell" in sys.modules:
        disable = False
    return tqdm(*args, disable=disable, **options)
