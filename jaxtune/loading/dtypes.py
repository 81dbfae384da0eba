"""What weights are kept in, and what is computed in."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import OptionError


def dtypes(
    dtype: Any, *, full_finetuning: bool = False, float32_mixed_precision: bool | None = None
) -> tuple[jnp.dtype, str | None]:
    """What weights are kept in, and what is computed in if that is something else."""
    chosen = compute_dtype(dtype)
    if float32_mixed_precision and not full_finetuning:
        raise OptionError(
            "float32_mixed_precision=True without full_finetuning=True.",
            expected="both: an adapter is kept in float32 anyway, and the base does not change.",
            fix="Leave float32_mixed_precision out.",
        )
    if full_finetuning and chosen == jnp.float16:
        raise OptionError(
            "full_finetuning=True in float16.",
            expected="bfloat16 or float32: in float16 small gradients and small steps are zero.",
            fix="Leave dtype out.",
        )
    return (jnp.dtype(jnp.float32), chosen.name) if float32_mixed_precision else (chosen, None)


def compute_dtype(dtype: Any) -> jnp.dtype:
    """float32, bfloat16 or float16, from a name or a library's dtype; None and "auto" are this machine's best."""
    if dtype is None or dtype == "auto":
        return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    try:
        name = str(dtype).removeprefix("torch.") if "torch" in str(dtype) else jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise OptionError(
            f"dtype={dtype!r}.",
            expected="float32, bfloat16, float16 or None.",
            fix="Leave dtype out for the default.",
        )
    return jnp.dtype(name)
