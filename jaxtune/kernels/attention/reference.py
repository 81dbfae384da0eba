"""Attention in plain XLA: any mask of the kind below, memory O(S x block) instead of O(S x S).

A query sees a key if both belong to the same segment (0 is padding and sees nothing), the key's position is not
later, and it lies within the window. Positions restart in every segment, so one formula serves packed rows, left
and right padding, and a cache whose columns were written at different times.

Shapes: B rows, T queries, S keys, H heads, K key/value heads, G = H / K, D head size.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax


def attention(
    q_BTHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    *,
    q_segments_BT: jax.Array,
    kv_segments_BS: jax.Array,
    q_positions_BT: jax.Array,
    kv_positions_BS: jax.Array,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: jax.Array | None,
    block: int,
) -> jax.Array:
    B, T, H, D = q_BTHD.shape
    K = k_BSKD.shape[2]
    one = functools.partial(
        _attend,
        k=k_BSKD,
        v=v_BSKD,
        kv_seg=kv_segments_BS,
        kv_pos=kv_positions_BS,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=None if sinks_H is None else sinks_H.reshape(1, K, H // K, 1, 1),
    )
    q = q_BTHD.reshape(B, T, K, H // K, D)
    # The backward pass keeps no scores: they are computed again. (Nothing could be shared with the forward pass inside
    # a loop, so CSE needs no preventing there.)
    if T <= block:
        return jax.checkpoint(one)(q, q_segments_BT, q_positions_BT).reshape(B, T, H, D)

    # Blocks of queries, one after the other, all of one size and as little padding as that allows.
    n = math.ceil(T / block)
    block = math.ceil(T / n)

    def blocks(x):  # [B, T, ...] -> [n, B, block, ...]; the padding is segment 0
        x = jnp.pad(x, [(0, 0), (0, n * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, n, block, *x.shape[2:]), 1, 0)

    again = jax.checkpoint(one, prevent_cse=False)
    out = lax.map(lambda qsp: again(*qsp), (blocks(q), blocks(q_segments_BT), blocks(q_positions_BT)))
    return jnp.moveaxis(out, 0, 1).reshape(B, n * block, H, D)[:, :T]


def _attend(q, q_seg, q_pos, *, k, v, kv_seg, kv_pos, scale, window, softcap, sinks):
    q_seg, q_pos, kv_seg, kv_pos = q_seg[:, :, None], q_pos[:, :, None], kv_seg[:, None], kv_pos[:, None]
    visible = (q_seg == kv_seg) & (q_seg != 0) & (kv_pos <= q_pos)
    if window is not None:
        visible &= q_pos - kv_pos < window
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.astype(scores.dtype), (*scores.shape[:-1], 1))
        scores = jnp.concatenate([scores, sinks], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v)
