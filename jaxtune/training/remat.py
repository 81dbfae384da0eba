"""Named levels of rematerialisation: what a block keeps for the backward pass, from everything to nothing.

Names tag values in `models.parts`: "block_input", "qkv" (after rope), "mid" (the residual between attention and MLP),
"gate_up"; and in `kernels.attention`: "attention" and "attention_statistics". What is not kept is computed again.
"""

import jax

from jaxtune.errors import OptionError, nearest
from jaxtune.models.layer_loop import Remat

_policies = jax.checkpoint_policies

_ATTENTION = ("attention", "attention_statistics")

MLP_TOKENS = 4096

LEVELS: dict[str, Remat] = {
    "none": Remat(None, unrolled=True),
    "mlp": Remat(_policies.save_only_these_names("qkv", *_ATTENTION, "mid", "gate_up"), unrolled=True),
    "attention": Remat(_policies.save_only_these_names("qkv", *_ATTENTION, "mid")),
    "block": Remat(_policies.nothing_saveable),
    "offload_attention": Remat(
        _policies.save_only_these_names("qkv", *_ATTENTION), on_host=True, mlp_tokens=MLP_TOKENS
    ),
    "offload": Remat(_policies.nothing_saveable, on_host=True, mlp_tokens=MLP_TOKENS),
}
"""From fastest and largest to smallest: keep all; keep what enters the elementwise MLP; keep attention's; keep the
blocks' inputs alone; keep those in the host's pinned memory. Where the most is kept, copying it in and out of stacks
costs more than compiling every layer."""

_ALIASES: dict[bool | str, str] = {True: "block", False: "none", "unsloth": "block"}


def level(use_gradient_checkpointing: bool | str) -> str:
    """`use_gradient_checkpointing` as Unsloth has it (True, False, "unsloth"), or one of our names -> our name."""
    name = _ALIASES.get(use_gradient_checkpointing, use_gradient_checkpointing)
    if name not in LEVELS:
        known = [str(known) for known in (*LEVELS, "unsloth", True, False)]
        raise OptionError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r}.",
            expected=f"one of {', '.join(known)}.",
            fix=f"Choose one of them.{nearest(str(name), known)}",
        )
    return str(name)


def remat(name: str) -> Remat:
    """What `CausalLM.hidden` takes."""
    return LEVELS[name]
