"""Named levels of rematerialisation: what a block keeps for the backward pass, from everything to nothing.

Names tag values in `models.parts`: "block_input", "qkv" (after rope), "mid" (the residual between attention and MLP),
"gate_up"; and in `kernels.attention`: "attention" and "attention_statistics". What is not kept is computed again.
"""

from collections.abc import Callable

import jax

from jaxtune.errors import OptionError, nearest

_policies = jax.checkpoint_policies

_ATTENTION = ("attention", "attention_statistics")

LEVELS: dict[str, Callable | None] = {
    "none": None,
    "mlp": _policies.save_only_these_names("qkv", *_ATTENTION, "mid", "gate_up"),
    "attention": _policies.save_only_these_names("qkv", *_ATTENTION, "mid"),
    "block": _policies.nothing_saveable,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""From fastest and largest to smallest: keep all; keep what enters the elementwise MLP; keep attention's; keep the
blocks' inputs alone; keep those in the host's pinned memory."""

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


def remat(name: str) -> Callable[[Callable], Callable] | None:
    """What `CausalLM.hidden` takes: wraps the scanned block so that it keeps what the level says."""
    policy = LEVELS[name]
    if policy is None:
        return None
    # Inside a scan nothing can be shared between forward and backward, so CSE needs no preventing.
    return lambda block: jax.checkpoint(block, policy=policy, prevent_cse=False)
