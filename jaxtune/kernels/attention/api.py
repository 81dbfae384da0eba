"""Causal grouped-query attention over segments: one function, which picks its implementation."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels import gpu
from jaxtune.kernels.attention import cudnn, mosaic_gpu, reference
from jaxtune.kernels.choice import Candidates, choose

BLOCK = 512
"""Queries at a time on the XLA path: 4 rows x 4096 keys x 32 heads keep 1 GiB of float32 scores."""

OURS_UP_TO = {96: 4096, 128: 16384}
"""By the head's size, the longest row of one segment at which our kernels are faster than cuDNN's, as measured on an
H100 (docs/kernels.md; with heads of 128 in whole steps too). They also are in packed rows, and with windows over heads
of up to 128."""

NAME = "attention"
IMPLEMENTATIONS: Candidates = {"cudnn": cudnn.why_not_here, "mosaic_gpu": gpu.why_not_mosaic, "xla": None}
"""By what the machine has; a case may ask for more, and for another order."""


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
    pieces_GM: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    seen: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """Queries [B, T, H, D] against keys and values [B, S, K, D] -> [B, T, H, D].

    Visible are keys of the query's own segment (0 is padding), no later in position, at most `window - 1` earlier.
    `softcap` turns scores into softcap tanh(score / softcap), before the mask. `sinks` are scores of a key of each head
    that every query sees, whose value is 0. Outputs of padding queries are finite and mean nothing.

    `pieces_GM` promises a layout, which some implementations ask for: keys are the queries' own tokens, and all tokens,
    row after row, are pieces laid end to end, so long each, zeros aside. A piece is a whole segment, or padding, of at
    most B T / G tokens: memory may be reserved for G M such pieces. [B, 1] promises one segment in each row, from its
    start, with padding after it.

    `seen` is what `see` gives of the same segments, pieces and window; without it, it is found out here.

    `implementation`: see `kernels.choice`. The output is named "attention" for rematerialisation, and what its backward
    pass needs besides "attention_statistics".
    """
    _require_shapes(
        q_BTHD, k_BSKD, v_BSKD, q_segments_BT, kv_segments_BS, q_positions_BT, kv_positions_BS, sinks_H
    )
    why_not = {
        "cudnn": lambda: cudnn.why_not_here() or cudnn.why_not(q_BTHD, pieces_GM, softcap, sinks_H),
        "mosaic_gpu": lambda: gpu.why_not_mosaic() or mosaic_gpu.why_not(q_BTHD, pieces_GM),
        "xla": None,
    }
    chosen = choose(
        NAME, implementation, {name: why_not[name] for name in _fastest_first(q_BTHD, pieces_GM, window)}
    )
    if chosen == "cudnn":
        assert pieces_GM is not None
        return cudnn.attention(q_BTHD, k_BSKD, v_BSKD, pieces_GM=pieces_GM, scale=scale, window=window)
    if chosen == "mosaic_gpu":
        out, lse_BHT = mosaic_gpu.attention(
            q_BTHD, k_BSKD, v_BSKD, segments_BT=q_segments_BT, scale=scale, window=window, softcap=softcap,
            packed=_are_packed(pieces_GM), seen=seen,
        )  # fmt: skip
        return out if sinks_H is None else with_sinks(out, lse_BHT, sinks_H)
    out = reference.attention(
        q_BTHD,
        k_BSKD,
        v_BSKD,
        q_segments_BT=q_segments_BT,
        kv_segments_BS=kv_segments_BS,
        q_positions_BT=q_positions_BT,
        kv_positions_BS=kv_positions_BS,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks_H=sinks_H,
        block=BLOCK,
    )
    return checkpoint_name(out, cudnn.OUTPUT)


def see(segments_BT: jax.Array, pieces_GM: jax.Array | None, window: int | None, size: int) -> Any:
    """What of `attention` is the same in all layers with this window and heads of this size; None if nothing is."""
    if pieces_GM is None or gpu.why_not_mosaic() is not None or size not in mosaic_gpu.SIZES:
        return None
    return mosaic_gpu.see(segments_BT, window, size, _are_packed(pieces_GM))


def _are_packed(pieces_GM: jax.Array | None) -> bool:
    return pieces_GM is None or pieces_GM.shape[1] > 1


def _fastest_first(q_BTHD: jax.Array, pieces_GM: jax.Array | None, window: int | None) -> tuple[str, ...]:
    _, length, _, size = q_BTHD.shape
    windowed = window is not None and size <= 128
    ours = _are_packed(pieces_GM) or windowed or length <= OURS_UP_TO.get(size, 0)
    return ("mosaic_gpu", "cudnn", "xla") if ours else ("cudnn", "mosaic_gpu", "xla")


def with_sinks(out_BTHD: jax.Array, lse_BHT: jax.Array, sinks_H: jax.Array) -> jax.Array:
    """A sink adds to each softmax's denominator, and nothing to what is summed."""
    share_BHT = jax.nn.sigmoid(lse_BHT - sinks_H.astype(lse_BHT.dtype)[None, :, None])
    share_BTH1 = jnp.swapaxes(share_BHT, 1, 2)[..., None]
    return (out_BTHD.astype(share_BTH1.dtype) * share_BTH1).astype(out_BTHD.dtype)


def _require_shapes(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
    q_positions: jax.Array,
    kv_positions: jax.Array,
    sinks: jax.Array | None,
) -> None:
    if k.shape != v.shape or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} are not of as many rows and of one head size"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads")
    for name, found, of in (
        ("q_segments", q_segments, q), ("q_positions", q_positions, q), ("kv_segments", kv_segments, k),
        ("kv_positions", kv_positions, k),
    ):  # fmt: skip
        if found.shape != of.shape[:2]:
            raise ValueError(f"{name} are {found.shape}, and rows and tokens {of.shape[:2]}")
    if sinks is not None and sinks.shape != q.shape[2:3]:
        raise ValueError(f"sinks are {sinks.shape}, and there are {q.shape[2]} query heads")
