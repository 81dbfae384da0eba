"""A merged model in 4 bits, as a bitsandbytes checkpoint: the original weights with the adapter merged in, in the
checkpoint's own precision, and only then quantised, by the very way in which a checkpoint is loaded into NF4."""

from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxtune.export.bnb_folder import save_bnb
from jaxtune.export.merge import EMBEDDING_WEIGHT, MergedCheckpoint, Trained
from jaxtune.export.original import record_of
from jaxtune.loading.load import load_params
from jaxtune.models.causal_lm import CausalLM
from jaxtune.quant import FourBit


def save_merged_4bit(
    folder: str | Path,
    trained: Trained,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
) -> None:
    """What is not quantised keeps the original's dtype."""
    with trained.open() as checkpoint:
        merged = MergedCheckpoint.of(checkpoint, trained)
        model = CausalLM(merged.settings(trained.config))
        dtype = jnp.dtype(merged.dtype(EMBEDDING_WEIGHT))
        params = load_params(model, merged, dtype=dtype, precision=FourBit())
        save_bnb(
            folder,
            trained.base,
            model,
            params,
            tokenizer=tokenizer,
            max_shard_size=max_shard_size,
            record=record_of(trained),
            quantised_from=merged,
            verify=verify,
        )
