"""The one progress bar: in a terminal, in a notebook, and silent where nobody looks on."""

import sys
from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **options: Any) -> tqdm:
    # In a notebook stderr is no terminal, and yet somebody looks on.
    in_a_notebook = "ipykernel.zmqshell" in sys.modules
    return tqdm(*args, disable=False if in_a_notebook else None, **options)
