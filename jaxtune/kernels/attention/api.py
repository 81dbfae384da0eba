"""Causal grouped-query attention over segments: one function, which picks its implementation."""

import jax

from jaxtune.kernels.attention import reference
from jaxtune.kernels.choice import Candidates, choose

BLOCK = 512
"""Queries at a time on the XLA path: 4 rows x 4096 keys x 32 heads keep 1 GiB of float32 scores."""


NAME = "attention"
IMPLEMENTATIONS: Candidates = {"xla": None}


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
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Queries [B, T, H, D] against keys and values [B, S, K, D] -> [B, T, H, D].

    Visible are keys of the query's own segment (0 is padding), no later in position, at most `window - 1` earlier.
    `softcap` turns scores into softcap tanh(score / softcap), before the mask.
    Outputs of padding queries are finite and mean nothing. `implementation`: see `kernels.choice`.
    """
    choose(NAME, implementation, IMPLEMENTATIONS)
    return reference.attention(
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
