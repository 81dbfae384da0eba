"""Attention by our own kernels, for rows of segments, with a window, a softcap, or neither: what they are given, and
the gradient that joins them.

Shapes: B rows, T tokens, H heads, K key/value heads, D head size; N tokens of all rows, each padded to whole tiles.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels.attention import mosaic_backward, mosaic_forward
from jaxtune.kernels.attention.cudnn import OUTPUT, STATISTICS
from jaxtune.kernels.attention.intervals import Intervals, intervals
from jaxtune.kernels.attention.mosaic_forward import TILE

SIZES = (64, 96, 128, 256)
"""Of a head."""


class Form(NamedTuple):
    scale: float
    softcap: float | None
    blocks: "Blocks"
    interpret: bool

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "interpret": self.interpret}


Size = tuple[int, tuple[int, int]]
"""Of a block, and how many there may be of what is read first, and of what is read in the middle."""


class Blocks(NamedTuple):
    """What is fetched at a time, as it was fastest on an H100."""

    forward: Size
    of_queries: Size
    of_keys: Size


def blocks(size: int, packed: bool) -> Blocks:
    """For heads of this size. Of 256, shared memory holds less."""
    if size > 128:
        return Blocks((64, (2, 2)), (64, (2, 1)), (64, (2, 1)))
    if packed:
        return Blocks((64, (3, 3)), (64, (2, 2)), (64, (3, 3)))
    return Blocks((128, (2, 2)), (64, (2, 2)), (64, (2, 2)))


def why_not(q_BTHD: jax.Array, pieces_GM: jax.Array | None) -> str | None:
    """What keeps it from doing this on a machine where it runs."""
    if pieces_GM is None:
        return "the layout of the rows is not given"
    if q_BTHD.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q_BTHD.dtype}"
    if q_BTHD.shape[-1] not in SIZES:
        return f"it has no heads of {q_BTHD.shape[-1]}"
    return None


def attention(
    q_BTHD: jax.Array,
    k_BTKD: jax.Array,
    v_BTKD: jax.Array,
    *,
    segments_BT: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    packed: bool = True,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The output, and [B, H, T] the logarithm of each softmax's denominator, in float32; both mean nothing where a
    query is padding (0 in `segments`). Each segment is one stretch of its row, `packed` with others or not."""
    B, T = segments_BT.shape
    rest = -T % TILE  # a block that began in one row and ended in the next would carry NaN across
    pad = lambda x: jnp.pad(x, [(0, 0), (0, rest)] + [(0, 0)] * (x.ndim - 2)) if rest else x
    q, k, v, segments = (pad(x) for x in (q_BTHD, k_BTKD, v_BTKD, segments_BT))
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    form = Form(scale, softcap, blocks(q.shape[-1], packed), interpret)
    out, lse = _attend(flat(q), flat(k), flat(v), intervals(segments, window), form)
    lse_BHT = jnp.moveaxis(lse.reshape(-1, B, T + rest), 1, 0)
    return out.reshape(q.shape)[:, :T], lse_BHT[:, :, :T]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: Intervals, form: Form) -> Any:
    return _forward(q, k, v, seen, form)[0]


def _forward(q, k, v, seen, form):
    keys, stages = form.blocks.forward
    out, log_sums = mosaic_forward.forward(q, k, v, seen, **form.settings(), keys=keys, stages=stages)
    out, log_sums = checkpoint_name(out, OUTPUT), checkpoint_name(log_sums, STATISTICS)
    return (out, log_sums * math.log(2)), (q, k, v, seen, out, log_sums)


def _backward(form, kept, gradients):
    q, k, v, seen, out, log_sums = kept
    dout, dlse = gradients
    # The gradient of the denominators' logarithm is spread over the scores as the weights are.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1).T - dlse
    given = (q, k, v, dout, log_sums, delta, seen)
    blocks, settings = form.blocks, form.settings()
    keys, stages = blocks.of_queries
    dq = mosaic_backward.gradient_of_queries(*given, **settings, keys=keys, stages=stages)
    queries, stages = blocks.of_keys
    of_keys = functools.partial(
        mosaic_backward.gradient_of_keys, *given, **settings, queries=queries, stages=stages
    )
    if q.shape[-1] <= 128:
        dk, dv = of_keys()
    else:  # registers hold one gradient at a time
        (dk,), (dv,) = of_keys(of_values=False), of_keys(of_keys=False)
    return dq, dk, dv, jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), seen)


_attend.defvjp(_forward, _backward)
