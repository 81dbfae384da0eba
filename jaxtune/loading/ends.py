"""Which tokens end a text, as a model's files say it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import ConfigError
from jaxtune.loading.config import read_json

GENERATION_FILE = "generation_config.json"


def read_ends(folder: Path, hf: Mapping[str, Any]) -> tuple[int, ...]:
    """By generation_config.json, or else by the config; the first is the end of a text, others may end an answer."""
    path = folder / GENERATION_FILE
    generation = read_json(path) if path.is_file() else {}
    named = generation.get("eos_token_id") or hf.get("eos_token_id")
    ids = [] if named is None else named if isinstance(named, list) else [named]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ConfigError(
            f"{folder} gives eos_token_id as {named!r}.",
            expected="a token's id, or a list of them.",
            fix=f"Correct it in {GENERATION_FILE} or config.json.",
        )
    return tuple(ids)
