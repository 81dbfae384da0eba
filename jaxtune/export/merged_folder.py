"""A merged model as a Hugging Face folder, in the original's precision and with its shards."""

import collections
import json
from pathlib import Path
from typing import Any

from jaxtune.export.hf_folder import Shards, main_dtype, nbytes, parse_size, split, write_model
from jaxtune.export.merge import MergedCheckpoint, Trained
from jaxtune.export.safetensors_stream import Entry
from jaxtune.export.verify.forward import verify_forward
from jaxtune.loading.checkpoint import INDEX_FILE, SINGLE_FILE


def save_merged_16bit(
    folder: str | Path,
    trained: Trained,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
) -> None:
    """Shards are the original's, names and all, unless one is larger than `max_shard_size`."""
    limit = parse_size(max_shard_size)
    with trained.open() as checkpoint:
        merged = MergedCheckpoint.of(checkpoint, trained)
        shards = _shards(merged, limit)
        config = merged.settings(trained.config)
        write_model(
            folder,
            trained.base,
            config,
            shards,
            merged.read,
            dtype=main_dtype(shards),
            tokenizer=tokenizer,
            check=(lambda stage: verify_forward(stage, merged, trained)) if verify else None,
        )


def _shards(merged: MergedCheckpoint, limit: int) -> Shards:
    entries = [Entry(name, merged.shape(name), merged.dtype(name)) for name in merged.names]
    original = _original_shards(merged, entries)
    if all(nbytes(shard) <= limit or len(shard) == 1 for shard in original.values()):
        return original
    return split(entries, limit)


def _original_shards(merged: MergedCheckpoint, entries: list[Entry]) -> Shards:
    base = merged.checkpoint.folder
    if (base / SINGLE_FILE).is_file():
        return {SINGLE_FILE: entries}
    files = json.loads((base / INDEX_FILE).read_text())["weight_map"]  # which Checkpoint has checked
    shards: Shards = collections.defaultdict(list)
    for entry in entries:
        shards[files[merged.origin(entry.name)]].append(entry)
    return dict(sorted(shards.items()))
