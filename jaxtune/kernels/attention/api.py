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
    lengths_BM: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Queries [B, T, H, D] against keys and values [B, S, K, D] -> [B, T, H, D].

    Visible are keys of the query's own segment (0 is padding), no later in position, at most `window - 1` earlier.
    `softcap` turns scores into softcap tanh(score / softcap), before the mask. Outputs of padding queries are finite
    and mean nothing.

    `lengths_BM` promises a layout: keys are the queries' own tokens, and a row's segments lie end to end from its
    start, so long each (0 where there are fewer), with padding after them. Some implementations ask for it.
    `implementation`: see `kernels.choice`. The output is named "attention" for rematerialisation, and what its backward
    pass needs besides "attention_statistics".
    """
    why_not = lambda: cudnn.why_not_here() or cudnn.why_not(q_BTHD, lengths_BM, softcap)
    if choose(NAME, implementation, {**IMPLEMENTATIONS, "cudnn": why_not}) == "cudnn":
        assert lengths_BM is not None
        return cudnn.attention(q_BTHD, k_BSKD, v_BSKD, lengths_BM=lengths_BM, scale=scale, window=window)
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
