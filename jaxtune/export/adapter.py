"""Saves an adapter as a PEFT folder: adapter_config.json, adapter_model.safetensors, and the tokenizer if given."""

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from jaxtune.errors import OutputFolderError
from jaxtune.export.verify.adapter import verify_adapter
from jaxtune.folders import named, staged
from jaxtune.loading.config import CONFIG_FILE
from jaxtune.loading.tokenizer import save_tokenizer
from jaxtune.lora import peft_format
from jaxtune.lora.config import LoraConfig, ModuleNames
from jaxtune.lora.tables import Tables, table_names
from jaxtune.lora.tree import Tree


def save_adapter(
    folder: str | Path,
    adapter: Tree,
    config: LoraConfig,
    module_names: ModuleNames,
    *,
    base: str,
    revision: str | None = None,
    tokenizer: Any = None,
    tables: Tables | None = None,
    verify: bool = True,
) -> None:
    """`tables` are the base's, where they are not the original's."""
    if (named(folder) / CONFIG_FILE).is_file():
        raise OutputFolderError(
            f"{folder} holds a model.",
            expected="a folder of its own: whoever loads one that has both takes the adapter.",
            fix="Choose another name.",
        )
    with staged(folder, marker=peft_format.CONFIG_FILE) as stage:
        tensors = dict(peft_format.to_tensors(adapter, config, module_names))
        table_name = table_names(config, module_names)
        tensors |= {table_name[name]: table for name, table in (tables or {}).items()}
        save_file(tensors, stage / peft_format.WEIGHTS_FILE, metadata={"format": "pt"})
        if tokenizer is not None:
            save_tokenizer(tokenizer, stage)
        settings = peft_format.to_peft_config(config, base, revision)
        (stage / peft_format.CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")
        if verify:
            verify_adapter(stage, tensors, config)
