"""A merged model in 4 bits, as a bitsandbytes checkpoint: the original weights with the adapter merged in, in the
checkpoint's own precision, and only then quantised, by the very way in which a checkpoint is loaded into NF4."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxtune.export.bnb_folder import save_bnb
from jaxtune.export.merge import EMBEDDING_WEIGHT, MergedCheckpoint
from jaxtune.export.weights import Weight
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.load import load_params
from jaxtune.lora.config import LoraConfig, ModuleNames
from jaxtune.lora.tree import Tree
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import ModelConfig
from jaxtune.quant import FourBit


def save_merged_4bit(
    folder: str | Path,
    base: Path,
    lora: Tree | None,
    lora_config: LoraConfig | None,
    module_names: ModuleNames,
    *,
    own: Mapping[str, Weight] | None = None,
    config: ModelConfig,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """`base` is the folder of the original weights. What is not quantised keeps their dtype."""
    with Checkpoint(base) as checkpoint:
        tied = config.tie_word_embeddings
        merged = MergedCheckpoint.of(checkpoint, lora, lora_config, module_names, own=own, tied=tied)
        model = CausalLM(merged.settings(config))
        dtype = jnp.dtype(merged.dtype(EMBEDDING_WEIGHT))
        params = load_params(model, merged, dtype=dtype, precision=FourBit())
    save_bnb(folder, base, model, params, tokenizer=tokenizer, max_shard_size=max_shard_size)
