"""Reads a PEFT adapter folder."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import AdapterError, CheckpointError
from jaxtune.loading.checkpoint import read_file
from jaxtune.lora import peft_format
from jaxtune.lora.config import EMBEDDING, LoraConfig
from jaxtune.lora.tree import Tree
from jaxtune.models.causal_lm import CausalLM, Params


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
        peft: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise AdapterError(
            f"{path} is not JSON: {error}.",
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
    return AdapterFolder(folder, peft_format.from_peft_config(peft, str(path)), base, peft.get("revision"))


def read_weights(adapter: AdapterFolder, model: CausalLM, params: Params) -> Tree:
    """The adapter's tree, float32 arrays on the host, stacked for `model`, whose base it must have been trained on."""
    path = adapter.folder / peft_format.WEIGHTS_FILE
    tensors = _read(path)
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor.astype(np.float32)).all()]
    if broken:
        raise AdapterError(
            f"{path}: {broken[0]} holds NaN or infinite values.",
            expected="finite weights.",
            fix="Use an adapter from before its training diverged.",
        )
    config = model.lora_config
    assert config is not None
    for name, module in peft_format.copies_of_the_base(tensors, config).items():
        base = params[module if module in params else EMBEDDING]["weight"]
        _require_same(tensors.pop(name), np.asarray(base), name, path)
    return peft_format.from_tensors(tensors, config, model.skeleton, model.module_names, str(path))


def _require_same(copy: np.ndarray, base: np.ndarray, name: str, path: Path) -> None:
    """Either may have been rounded to 16 bits."""
    if copy.shape == base.shape:
        ours, theirs = (one.astype(np.float32) for one in (base, copy))
        if np.allclose(ours, theirs, rtol=2.0**-7, atol=1e-6):
            return
        found = "with values that are not its base model's"
    else:
        found = f"of shape {copy.shape}, where its base model has {base.shape}"
    raise AdapterError(
        f"{path} holds {name} {found}.",
        expected="the weight of the base model, which PEFT writes beside an adapter of it: the adapter was trained on "
        "another base, or one with tokens added.",
        fix="Save that base with transformers, and name its folder as base_model_name_or_path in "
        f"{peft_format.CONFIG_FILE}.",
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
