"""Causal grouped-query attention over segments: one function, which picks its implementation."""

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels.attention import cudnn, reference
from jaxtune.kernels.choice import Candidates, choose

BLOCK = 512
"""Queries at a time on the XLA path: 4 rows x 4096 keys x 32 heads keep 1 GiB of float32 scores."""

NAME = "attention"
IMPLEMENTATIONS: Candidates = {"cudnn": cudnn.why_not_here, "xla": None}
"""By what the machine has; a case may ask for more."""


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
    implementation: str | None = None,
) -> jax.Array:
    """Queries [B, T, H, D] against keys and values [B, S, K, D] -> [B, T, H, D].

    Visible are keys of the query's own segment (0 is padding), no later in position, at most `window - 1` earlier.
    `softcap` turns scores into softcap tanh(score / softcap), before the mask. Outputs of padding queries are finite
    and mean nothing.

    `pieces_GM` promises a layout, which some implementations ask for: keys are the queries' own tokens, and all tokens,
    row after row, are pieces laid end to end, so long each, zeros aside. A piece is a whole segment, or padding, of at
    most B T / G tokens: memory may be reserved for G M such pieces. [B, 1] promises one segment in each row, from its
    start, with padding after it.

    `implementation`: see `kernels.choice`. The output is named "attention" for rematerialisation, and what its backward
    pass needs besides "attention_statistics".
    """
    why_not = lambda: cudnn.why_not_here() or cudnn.why_not(q_BTHD, pieces_GM, softcap)
    if choose(NAME, implementation, {**IMPLEMENTATIONS, "cudnn": why_not}) == "cudnn":
        assert pieces_GM is not None
        return cudnn.attention(q_BTHD, k_BSKD, v_BSKD, pieces_GM=pieces_GM, scale=scale, window=window)
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
        block=BLOCK,
    )
    return checkpoint_name(out, cudnn.OUTPUT)
