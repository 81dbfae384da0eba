"""A PEFT folder, read back: every tensor bit for bit, and settings that mean what they meant."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxtune.errors import ExportError
from jaxtune.export.verify.checksums import AGAIN
from jaxtune.loading import adapter
from jaxtune.loading.checkpoint import read_file
from jaxtune.log import counted, get_logger
from jaxtune.lora import peft_format
from jaxtune.lora.config import LoraConfig

log = get_logger(__name__)


def verify_adapter(folder: Path, tensors: Mapping[str, np.ndarray], config: LoraConfig) -> None:
    """Raises unless `folder` holds these, and they can be loaded."""
    found = read_file(folder / peft_format.WEIGHTS_FILE)
    for name in sorted({*tensors, *found}):
        if name not in tensors or name not in found or not _is_same(tensors[name], found[name]):
            raise ExportError(
                f"The adapter, read back: {name} is not what was written.",
                expected="the tensor that was written, bit for bit.",
                fix=AGAIN,
            )
    adapter.require_finite(found, "The adapter, read back", " verify=False writes it all the same.")
    read = adapter.read_config(folder).config
    # How an adapter began is of no account later, and not said to all that read it.
    if dataclasses.replace(read, init_lora_weights=config.init_lora_weights) != config:
        raise ExportError(
            f"{peft_format.CONFIG_FILE}, read back, means {read}.",
            expected=f"{config}, as written.",
            fix="This is a fault of jaxtune's: please report it. verify=False writes the adapter all the same.",
        )
    log.info("The adapter, read back: its settings and %s as written.", counted(len(found), "tensor"))


def _is_same(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
