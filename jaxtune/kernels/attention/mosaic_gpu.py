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

from jaxtune.kernels.attention.cudnn import OUTPUT, STATISTICS
from jaxtune.kernels.attention.intervals import intervals
from jaxtune.kernels.attention.tiles import KEYS, QUERIES, TILE, Blocks, blocks

SIZES = (64, 96, 128, 256)
"""Of a head."""


class Form(NamedTuple):
    rows: int
    scale: float
    softcap: float | None
    blocks: Blocks
    interpret: bool

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "softcap": self.softcap, "interpret": self.interpret}


class Seen(NamedTuple):
    """Which tokens see which: the same for all layers with one window."""

    first: jax.Array
    """Of all tokens (`intervals`)."""
    forward: jax.Array
    of_queries: jax.Array
    of_keys: jax.Array
    """Each kernel's edges: its blocks, for every warpgroup. Where one finds all gradients, for every tile of keys, and
    the first tile for every block of queries."""


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
    seen: Seen | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The output, and [B, H, T] the logarithm of each softmax's denominator, in float32; both mean nothing where a
    query is padding (0 in `segments`). Each segment is one stretch of its row, `packed` with others or not. `seen` is
    what `see` gives of the same."""
    _, T, _, size = q_BTHD.shape
    if seen is None:
        seen = see(segments_BT, window, size, packed)
    q, k, v = map(_whole_tiles, (q_BTHD, k_BTKD, v_BTKD))
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    form = Form(len(q_BTHD), scale, softcap, blocks(size, packed, window is not None), interpret)
    out, lse = _attend(flat(q), flat(k), flat(v), seen, form)
    lse_BHT = jnp.moveaxis(lse.reshape(-1, *q.shape[:2]), 1, 0)
    return out.reshape(q.shape)[:, :T], lse_BHT[:, :, :T]


def see(segments_BT: jax.Array, window: int | None, size: int, packed: bool = True) -> Seen:
    """For heads of this `size`."""
    found, of = intervals(_whole_tiles(segments_BT), window), blocks(size, packed, window is not None)
    if of.at_once:
        backward = found.blocks(QUERIES, TILE)[:, 0], found.blocks_by(TILE, QUERIES)
    else:
        backward = found.blocks(QUERIES, of.of_queries[0]), found.blocks_by(KEYS, of.of_keys[0])
    return Seen(found.first, found.blocks(QUERIES, of.forward[0]), *backward)


def _whole_tiles(x_BT: jax.Array) -> jax.Array:
    """Rows of any kind of tokens, padded: a block that began in one and ended in the next would carry NaN across."""
    rest = -x_BT.shape[1] % TILE
    return jnp.pad(x_BT, [(0, 0), (0, rest)] + [(0, 0)] * (x_BT.ndim - 2)) if rest else x_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: Seen, form: Form) -> Any:
    return _forward(q, k, v, seen, form)[0]


def _forward(q, k, v, seen, form):
    from jaxtune.kernels.attention import mosaic_forward  # which imports Pallas: a quarter of a second

    keys, stages = form.blocks.forward
    out, log_sums = mosaic_forward.forward(
        q, k, v, seen.first, seen.forward, **form.settings(), keys=keys, stages=stages
    )
    out, log_sums = checkpoint_name(out, OUTPUT), checkpoint_name(log_sums, STATISTICS)
    return (out, log_sums * math.log(2)), (q, k, v, seen, out, log_sums)


def _backward(form, kept, gradients):
    from jaxtune.kernels.attention import mosaic_backward, mosaic_gradients

    q, k, v, seen, out, log_sums = kept
    dout, dlse = gradients
    # The gradient of the denominators' logarithm is spread over the scores as the weights are.
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(axis=-1).T - dlse
    given, settings = (q, k, v, dout, log_sums, delta, seen.first), form.settings()
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), seen)
    if form.blocks.at_once:
        found = mosaic_gradients.gradients(*given, seen.of_queries, seen.of_keys, rows=form.rows, **settings)
        return *found, nothing
    keys, stages = form.blocks.of_queries
    dq = mosaic_backward.gradient_of_queries(*given, seen.of_queries, **settings, keys=keys, stages=stages)
    queries, stages = form.blocks.of_keys
    of_keys = functools.partial(
        mosaic_backward.gradient_of_keys, *given, seen.of_keys, **settings, queries=queries, stages=stages
    )
    if q.shape[-1] <= 128:
        dk, dv = of_keys()
    else:  # registers hold one gradient at a time
        (dk,), (dv,) = of_keys(of_values=False), of_keys(of_keys=False)
    return dq, dk, dv, nothing


_attend.defvjp(_forward, _backward)
