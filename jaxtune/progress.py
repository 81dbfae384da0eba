"""The one progress bar: in a terminal, in a notebook, and silent where nobody looks on."""

from typing import Any

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook

_IN_A_NOTEBOOK = issubclass(tqdm, tqdm_notebook)
"""There stderr is no terminal, and yet somebody looks on."""


def progress_bar(*args: Any, **options: Any) -> tqdm:
    return tqdm(*args, disable=False if _IN_A_NOTEBOOK else None, **options)
