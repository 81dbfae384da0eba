"""Named levels of rematerialisation: what a block keeps for the backward pass, from everything to nothing.

Names tag values in `models.parts`: "block_input", "qkv" (after rope), "mid" (the residual between attention and MLP),
"gate_up"; and in `kernels.attention`: "attention" and "attention_statistics". What is not kept is computed again.
"""

import jax

from jaxtune.errors import OptionError, nearest
from jaxtune.models.layer_loop import Remat

_policies = jax.checkpoint_policies

_ATTENTION = ("attention", "attention_statistics")

_SMALL = Remat(None, on_host=True, mlp_tokens=4096, head_tokens=512)
"""What is alive of the layers, of an MLP and of the head, where memory is what counts."""

LEVELS: dict[str, Remat] = {
    "none": Remat(None, unrolled=True),
    "mlp": Remat(_policies.save_only_these_names("qkv", *_ATTENTION, "mid", "gate_up"), unrolled=True),
    "attention": Remat(_policies.save_only_these_names("qkv", *_ATTENTION, "mid")),
    "block": Remat(_policies.nothing_saveable),
    "offload_attention": _SMALL._replace(policy=_policies.save_only_these_names("qkv", *_ATTENTION)),
    "offload": _SMALL._replace(policy=_policies.nothing_saveable),
}
"""From what needs most of the device's memory to what needs least: keep all; keep what enters the elementwise MLP; keep
attention's; keep the blocks' inputs alone; keep those and attention's in the host's pinned memory; keep the inputs
alone there. Where the most is kept, copying it in and out of stacks costs more than compiling every layer."""

AUTO = "auto"
FASTEST_FIRST = ("mlp", "attention", "offload_attention", "offload")
"""What `AUTO` chooses from. "block" is not among them: "offload_attention" was as fast in less memory (see
docs/performance.md)."""

_ALIASES: dict[bool | str, str] = {True: "block", False: "none", "unsloth": AUTO}


def level(use_gradient_checkpointing: bool | str) -> str:
    """`use_gradient_checkpointing` as Unsloth has it (True, False, "unsloth"), or one of our names -> our name."""
    name = _ALIASES.get(use_gradient_checkpointing, use_gradient_checkpointing)
    if name != AUTO and name not in LEVELS:
        known = [str(known) for known in (AUTO, *LEVELS, "unsloth", True, False)]
        raise OptionError(
            f"use_gradient_checkpointing={use_gradient_checkpointing!r}.",
            expected=f"one of {', '.join(known)}.",
            fix=f"Choose one of them.{nearest(str(name), known)}",
        )
    return str(name)


def remat(name: str) -> Remat:
    """What `CausalLM.hidden` takes."""
    return LEVELS[name]


def candidates(name: str, *, memory_is_known: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For a level or `AUTO`: (the levels that may be taken, the first one that fits; those to propose if none does)."""
    if name != AUTO:
        after = list(LEVELS).index(name) + 1
        return (name,), tuple(smaller for smaller in list(LEVELS)[after:] if smaller in FASTEST_FIRST)
    return (FASTEST_FIRST if memory_is_known else ("block",)), ()


def compiler_options(remat: Remat) -> dict[str, bool]:
    """In these programs all of cuBLAS' products are faster than with some of Triton's, which XLA picks one by one; and
    they need less memory."""
    return {"xla_gpu_enable_triton_gemm": False} if remat.unrolled or remat.mlp_tokens else {}
