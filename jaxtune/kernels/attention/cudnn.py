"""cuDNN's flash attention, for rows in which whole segments lie end to end.

JAX has no public name for the forward and backward operations apart; they are taken apart here so that a policy of
rematerialisation can keep the softmax's statistics together with the output, and the backward pass computes neither
again.

Nor has it one for packed rows whose segments cross what cuDNN takes for rows: to it, these only say how long a segment
may be, and its backward pass reserves float32 gradients of the queries for M segments so long in each. Tokens are
therefore given to it as rows just long enough for the longest piece, wherever pieces begin and end.

Shapes: B rows, T tokens, H heads, K key/value heads, D head size; G groups of M pieces (see `api`).
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
    """Pieces from the first to the last, then places without one."""

    lengths_GM: jax.Array
    """0 where there is none."""
    starts: jax.Array
    """[G, M + 1], in tokens; the number of all tokens where there is none."""


def why_not_here() -> str | None:
    """What keeps it from running on this machine, if anything does."""
    if cudnn is None:
        return "this version of JAX keeps it in another place"
    return None if capability() >= 8.0 else "it needs an NVIDIA GPU of compute capability 8.0"


def why_not(
    q_BTHD: jax.Array, pieces_GM: jax.Array | None, softcap: float | None, sinks_H: jax.Array | None
) -> str | None:
    """What keeps it from doing this on a machine where it runs."""
    if pieces_GM is None:
        return "the layout of the rows is not given"
    if softcap is not None:
        return "it has no softcap"
    if sinks_H is not None:
        return "it has no sinks"
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q_BTHD.dtype}"
    if q_BTHD.shape[1] == 1:
        return "it has no rows of one token"
    hopper, size = capability() >= 9.0, q_BTHD.shape[-1]
    if size % 8 or size > (256 if hopper else 128):
        return f"it has no heads of {size}"
    packed = pieces_GM.shape[1] > 1
    if packed and not hopper:
        return "rows of several segments need compute capability 9.0"
    if packed and q_BTHD.size >= 2**31:
        return "it counts the queries' values in 32 bits where rows have several segments"
    return None


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    pieces_GM: jax.Array,
    scale: float,
    window: int | None,
) -> jax.Array:
    """Each token sees its own segment up to itself; with one segment a row, padding at its end needs no care."""
    if pieces_GM.shape[1] == 1:
        return _attend(q_BTHD, k_BTKD, v_BTKD, None, float(scale), window)
    groups = len(pieces_GM)
    q, k, v = (x.reshape(groups, -1, *x.shape[2:]) for x in (q_BTHD, k_BTKD, v_BTKD))
    packing = _packing(pieces_GM, q.shape[0] * q.shape[1])
    return _attend(q, k, v, packing, float(scale), window).reshape(q_BTHD.shape)


def _packing(pieces_GM: jax.Array, tokens: int) -> _Packing:
    pieces = pieces_GM.reshape(-1)
    pieces = pieces[jnp.argsort(pieces == 0, stable=True)]
    starts = jnp.where(pieces > 0, jnp.cumsum(pieces) - pieces, tokens)
    groups, size = pieces_GM.shape
    starts = jnp.pad(starts, (0, groups), constant_values=tokens).reshape(groups, size + 1)
    return _Packing(pieces.reshape(groups, size), starts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, packing, scale, window):
    return _forward(q, k, v, packing, scale, window)[0]


def _forward(q, k, v, packing, scale, window):
    operands, settings = _call(q, k, packing, scale, window)
    # The one with "wrapper" knows how to be cut among devices, but only packed rows whose segments stay inside.
    forward = (
        cudnn._dot_product_attention_fwd_p_wrapper if packing is None else cudnn._dot_product_attention_fwd_p
    )
    out, statistics = forward.bind(q, k, v, *operands, **settings, is_training=True)
    return checkpoint_name(out, OUTPUT), checkpoint_name(statistics, STATISTICS)


def _keep(q, k, v, packing, scale, window):
    out, statistics = _forward(q, k, v, packing, scale, window)
    return out, (q, k, v, packing, out, statistics)


def _backward(scale, window, kept, dout):
    q, k, v, packing, out, statistics = kept
    operands, settings = _call(q, k, packing, scale, window)
    backward = (
        cudnn._dot_product_attention_bwd_p_wrapper if packing is None else cudnn._dot_product_attention_bwd_p
    )
    dq, dk, dv = backward.bind(q, k, v, *operands, statistics, out, dout, **settings)
    none = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), packing)
    return dq, dk, dv, none


_attend.defvjp(_keep, _backward)


def _call(q, k, packing, scale, window):
    """The operands after q, k and v, and the settings, that both directions share."""
    nothing = jnp.zeros(0, q.dtype)  # no bias, no pages
    if packing is None:
        lengths = q_starts = k_starts = nothing
        mask = cudnn.MaskType.CAUSAL
    else:
        lengths, starts = packing
        q_starts, k_starts = (starts * x.shape[2] * x.shape[3] for x in (q, k))
        mask = cudnn.MaskType.PADDING_CAUSAL
    settings = dict(
        scale=scale, seed=42, dropout_rate=0.0, variadic_args=(False, False), mask_type=mask,
        layout=cudnn.AttentionLayout.BTNH.value, sliding_window_length=window,
    )  # fmt: skip
    return (nothing, lengths, lengths, q_starts, k_starts, nothing, nothing), settings
