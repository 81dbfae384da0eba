"""Reads a PEFT adapter folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import AdapterError, CheckpointError
from jaxtune.loading.checkpoint import read_file
from jaxtune.lora import peft_format
from jaxtune.lora.config import LoraConfig
from jaxtune.lora.tables import Tables, take_tables
from jaxtune.lora.tree import Tree
from jaxtune.models.causal_lm import CausalLM


class AdapterFolder(NamedTuple):
    folder: Path
    config: LoraConfig
    base: str
    """The id or folder of the model that the adapter was trained on."""
    revision: str | None


def is_adapter(folder: Path) -> bool:
    return (folder / peft_format.CONFIG_FILE).is_file()


def read_config(folder: Path) -> AdapterFolder:
    path = folder / peft_format.CONFIG_FILE
    try:
        peft: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(peft, dict):
            raise ValueError(f"it holds a {type(peft).__name__}")
    except ValueError as error:
        raise AdapterError(
            f"{path} is not JSON with an adapter's settings: {error}.",
            expected="the settings that PEFT wrote.",
            fix="Save the adapter again.",
        ) from error
    base = peft.get("base_model_name_or_path")
    if not base:
        raise AdapterError(
            f"{path} does not name its base model.",
            expected="base_model_name_or_path.",
            fix="Add the id or folder of the model that the adapter was trained on.",
        )
    try:
        config = peft_format.from_peft_config(peft, str(path))
    except (TypeError, ValueError, AttributeError) as error:  # a number where a list should be, and the like
        raise AdapterError(
            f"{path} holds a setting of the wrong kind: {error}.",
            expected="the settings that PEFT wrote.",
            fix="Correct it, or save the adapter again.",
        ) from error
    return AdapterFolder(folder, config, base, peft.get("revision"))


class Adapted(NamedTuple):
    """A model as an adapter has it, and what the adapter's folder holds, on the host."""

    model: CausalLM
    """With the adapter's settings, and with as many tokens as its tables have rows."""
    lora: Tree
    """float32, stacked for `model`."""
    tables: Tables
    """Of a base that is not quite the original: its embedding and head, where tokens were added."""


def read_weights(adapter: AdapterFolder, base: CausalLM) -> Adapted:
    path = adapter.folder / peft_format.WEIGHTS_FILE
    tensors = _read(path)
    require_finite(tensors, str(path))
    c = base.config
    settings = adapter.config.on(tied=c.tie_word_embeddings)
    tables, rows = take_tables(
        tensors, settings, base.module_names, (c.vocab_size, c.hidden_size), str(path),
        tied=c.tie_word_embeddings,
    )  # fmt: skip
    config = dataclasses.replace(c, vocab_size=rows)
    model = dataclasses.replace(base, config=config, lora_config=settings)
    lora = peft_format.from_tensors(tensors, settings, model.skeleton, model.module_names, str(path))
    return Adapted(model, lora, tables)


def require_finite(tensors: Mapping[str, np.ndarray], source: str, otherwise: str = "") -> None:
    """`otherwise` is what else can be done."""
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor.astype(np.float32)).all()]
    if broken:
        raise AdapterError(
            f"{source}: {broken[0]} holds NaN or infinite values.",
            expected="finite weights.",
            fix=f"Use an adapter from before its training diverged.{otherwise}",
        )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        raise CheckpointError(
            f"{path} does not exist." + (" There is a pickled adapter_model.bin." if pickled else ""),
            expected="the adapter's weights as safetensors.",
            fix="Save the adapter with peft's save_pretrained, which writes safetensors.",
        )
    return read_file(path)
