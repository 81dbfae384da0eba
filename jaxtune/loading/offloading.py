"""Whether an embedding's table waits in the host's memory: what Unsloth calls `offload_embedding`."""

import math

import jax.numpy as jnp

from jaxtune.device_memory import Memory, default_device, of_device
from jaxtune.errors import OptionError
from jaxtune.log import get_logger
from jaxtune.models.causal_lm import CausalLM

log = get_logger(__name__)

WORTH_OFFLOADING = 1 / 20
"""Of the device's memory. Rows come over the bus: 16,384 of 8 KB in some milliseconds, where a step takes a second."""


def require_known(option: bool | str) -> None:
    if option not in (True, False, "auto"):
        raise OptionError(
            f"offload_embedding={option!r}.",
            expected='True, False or "auto".',
            fix="Leave it out, or choose one.",
        )


def offloads_embedding(
    option: bool | str,
    model: CausalLM,
    dtype: jnp.dtype,
    full_finetuning: bool,
    memory: Memory | None = None,
) -> bool:
    """`memory` is the device's, by default that of the one which is loaded to; "auto" offloads nothing from one that
    does not say what it has."""
    if option is True and full_finetuning:
        raise OptionError(
            "offload_embedding=True with full_finetuning=True.",
            expected="a frozen embedding: what is trained lies on the device.",
            fix="Leave one of them out.",
        )
    if option is True and model.config.tie_word_embeddings:
        log.warning(
            "offload_embedding: this model's head is its embedding, which therefore stays on the device."
        )
    if not option or full_finetuning or model.config.tie_word_embeddings:
        return False
    memory = memory or of_device(default_device())
    size = math.prod(model.skeleton["embed_tokens"]["weight"].shape) * dtype.itemsize
    return option is True or (memory is not None and size >= WORTH_OFFLOADING * memory.limit)
