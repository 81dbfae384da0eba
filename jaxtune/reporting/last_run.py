"""What a model remembers of the run that trained it, for its card."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class LastRun:
    method: str
    """In one word: "sft", "grpo"."""
    facts: Mapping[str, str]
    """Settings and results, as a card shows them."""
