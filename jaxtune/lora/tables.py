"""The base's own embedding and head in a PEFT folder. PEFT writes them beside the adapter where they are not the
original's: where tokens were added, so that they have other rows; and where they have an adapter of their own."""

from typing import Any

import numpy as np

from jaxtune.errors import AdapterError
from jaxtune.lora.config import EMBEDDING, HEAD, LoraConfig, ModuleNames
from jaxtune.lora.peft_format import PREFIX

Tables = dict[str, np.ndarray]
"""[rows, width] by `embed_tokens` and `lm_head`."""


def table_names(config: LoraConfig, module_names: ModuleNames) -> dict[str, str]:
    """How PEFT calls them: they may lie under an adapter, or under a copy that is trained."""
    found = {}
    for name in (EMBEDDING, HEAD):
        module = module_names((name,))[0]
        adapted = EMBEDDING if config.ensure_weight_tying else name
        under = "original_module." if adapted in config.modules_to_save else ""
        under = "base_layer." if config.targets(module_names((adapted,))[0]) else under
        found[name] = f"{PREFIX}{module}.{under}weight"
    return found


def unlike(tables: Tables, params: dict[str, Any]) -> Tables:
    """Those that are not what `params` have, in the bits of either's dtype."""
    bases = {name: np.asarray(params[name]["weight"]) for name in tables}
    return {name: table for name, table in tables.items() if not _is_same(table, bases[name])}


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return np.array_equal(one.astype(other.dtype), other) or np.array_equal(one, other.astype(one.dtype))


def take_tables(
    tensors: dict[str, np.ndarray],
    config: LoraConfig,
    module_names: ModuleNames,
    shape: tuple[int, int],
    source: str,
    *,
    tied: bool,
) -> tuple[Tables, int]:
    """Takes them out of an adapter's tensors, and says how many rows the model has by them. `shape` is the original's;
    `tied` says whether the head is the embedding."""
    names = table_names(config, module_names)
    tables = {name: tensors.pop(tensor) for name, tensor in names.items() if tensor in tensors}
    trained = {}
    for name in config.modules_to_save:
        module = f"{PREFIX}{module_names((name,))[0]}"
        tensors.pop(f"{module}.modules_to_save.weight", None)  # the same again
        if f"{module}.weight" in tensors:
            trained[name] = tensors[f"{module}.weight"]
    found = [*tables.items(), *trained.items()]
    rows = len(found[0][1]) if found else shape[0]
    for name, table in found:
        if table.shape != (rows, shape[1]):
            raise AdapterError(
                f"{source}: {name} has the shape {table.shape}.",
                expected=f"{(rows, shape[1])}, from the model's width and the adapter's other tables.",
                fix="Load the adapter onto the base model that it was trained on.",
            )
    if tied and HEAD in tables:
        head = tables.pop(HEAD)
        if not np.array_equal(tables.setdefault(EMBEDDING, head), head):
            raise AdapterError(
                f"{source} holds a head that is not its embedding.",
                expected="one table for both, as in the base model.",
                fix="Merge that adapter with peft first.",
            )
    if rows != shape[0]:
        # Below a table that is trained whole lies one that nobody reads: only its rows matter.
        tables = tables if tied else trained | tables
        missing = {EMBEDDING, *(() if tied else (HEAD,))} - set(tables)
        if missing:
            raise AdapterError(
                f"{source} has tables of {rows} rows, and lacks the base model's {' and '.join(sorted(missing))}, "
                f"which had {shape[0]}.",
                expected="the embedding and the head as they were resized.",
                fix="Save the adapter again with peft's save_pretrained(..., save_embedding_layers=True).",
            )
    return tables, rows
