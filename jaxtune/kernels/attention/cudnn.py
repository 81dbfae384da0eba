"""cuDNN's flash attention, for rows in which whole segments lie end to end.

JAX has no public name for the packed layout, nor for the forward and backward operations apart; they are taken apart
here so that a policy of rematerialisation can keep the softmax's statistics together with the output, and the backward
pass computes neither again.

Shapes: B rows, T tokens, H heads, K key/value heads, D head size, M segments of a row at most.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels.gpu import capability

cudnn: Any
try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
except ImportError:  # its place is private
    cudnn = None

OUTPUT, STATISTICS = "attention", "attention_statistics"
"""What policies call them."""


class _Packing(NamedTuple):
    lengths_BN: jax.Array
    """Of each segment, -1 where there is none; the row's padding is a segment too, so that its output is defined."""
    starts: jax.Array
    """[B, N + 1]: of each segment, -1 where there is none."""


def why_not_here() -> str | None:
    """What keeps it from running on this machine, if anything does."""
    if cudnn is None:
        return "this version of JAX keeps it in another place"
    return None if capability() >= 8.0 else "it needs an NVIDIA GPU of compute capability 8.0"


def why_not(q_BTHD: jax.Array, lengths_BM: jax.Array | None, softcap: float | None) -> str | None:
    """What keeps it from doing this on a machine where it runs."""
    if lengths_BM is None:
        return "the layout of the rows is not given"
    if softcap is not None:
        return "it has no softcap"
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q_BTHD.dtype}"
    hopper, size = capability() >= 9.0, q_BTHD.shape[-1]
    if size % 8 or size > (256 if hopper else 128):
        return f"it has no heads of {size}"
    if lengths_BM.shape[1] > 1 and not hopper:
        return "rows of several segments need compute capability 9.0"
    return None


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    lengths_BM: jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Each token sees its own segment up to itself; with one segment a row, padding at its end needs no care."""
    packing = _packing(lengths_BM, q_BTHD.shape[1]) if lengths_BM.shape[1] > 1 else None
    return _attend(q_BTHD, k_BTKD, v_BTKD, packing, float(scale), window)


def _packing(lengths_BM: jax.Array, tokens: int) -> _Packing:
    rest_B1 = tokens - lengths_BM.sum(1, keepdims=True)
    lengths_BN = jnp.concatenate([lengths_BM, rest_B1], axis=1)
    starts_BN = jnp.cumsum(lengths_BN, axis=1) - lengths_BN
    there_BN = lengths_BN > 0
    starts = jnp.pad(jnp.where(there_BN, starts_BN, -1), ((0, 0), (0, 1)), constant_values=-1)
    return _Packing(jnp.where(there_BN, lengths_BN, -1), starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, packing, scale, window):
    return _forward(q, k, v, packing, scale, window)[0]


def _forward(q, k, v, packing, scale, window):
    operands, settings = _call(q, packing, scale, window)
    out, statistics = cudnn._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *operands, **settings, is_training=True
    )
    return checkpoint_name(out, OUTPUT), checkpoint_name(statistics, STATISTICS)


def _keep(q, k, v, packing, scale, window):
    out, statistics = _forward(q, k, v, packing, scale, window)
    return out, (q, k, v, packing, out, statistics)


def _backward(scale, window, kept, dout):
    q, k, v, packing, out, statistics = kept
    operands, settings = _call(q, packing, scale, window)
    dq, dk, dv = cudnn._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *operands, statistics, out, dout, **settings
    )
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), packing)
    return dq, dk, dv, none


_attend.defvjp(_keep, _backward)


def _call(q, packing, scale, window):
    """The operands after q, k and v, and the settings, that both directions share."""
    nothing = jnp.zeros(0, q.dtype)  # no bias, no pages
    if packing is None:
        lengths = starts = nothing
        mask = cudnn.MaskType.CAUSAL
    else:
        lengths, starts = packing
        mask = cudnn.MaskType.PADDING_CAUSAL
    settings = dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=mask,
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=window,
    )  # fmt: skip
    return (nothing, lengths, lengths, starts, starts, nothing, nothing), settings
