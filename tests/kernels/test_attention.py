"""Attention against a plain softmax over an explicit mask, for every kind of row that occurs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels.attention import attention, reference
from tests.kit.compare import assert_close

B, T, H, K, D = 2, 24, 4, 2, 8


def positions_of(segments):
    """Counts within each segment."""
    out = np.zeros_like(segments)
    for row, line in enumerate(segments):
        for i in range(1, len(line)):
            out[row, i] = out[row, i - 1] + 1 if line[i] == line[i - 1] else 0
    return out


ROWS = {
    "one sequence": np.ones((B, T), np.int32),
    "right padding": np.array([[1] * 20 + [0] * 4, [1] * 9 + [0] * 15], np.int32),
    "left padding": np.array([[0] * 4 + [1] * 20, [0] * 15 + [1] * 9], np.int32),
    "packed": np.array([[1] * 7 + [2] * 10 + [3] * 7, [1] * 1 + [2] * 22 + [0] * 1], np.int32),
    "a row of padding": np.array([[1] * 24, [0] * 24], np.int32),
}


def plain(q, k, v, segments, positions, scale, window, softcap):
    k, v = np.repeat(k, H // K, axis=2), np.repeat(v, H // K, axis=2)
    scores = np.einsum("bthd,bshd->bhts", q, k).astype(np.float64) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    visible = (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    behind = positions[:, :, None] - positions[:, None]
    visible &= (behind >= 0) & (behind < (window or 10**9))
    scores = np.where(visible[:, None], scores, -np.inf)
    weights = np.exp(scores - np.where(visible.any(-1)[:, None, :, None], scores.max(-1, keepdims=True), 0))
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-30)
    return np.einsum("bhts,bshd->bthd", weights, v)


@pytest.mark.parametrize("block", [1024, 8, 7], ids=["one block", "blocks", "uneven blocks"])
@pytest.mark.parametrize(
    ("window", "softcap"), [(None, None), (5, None), (5, 0.4)], ids=["all", "window", "window and softcap"]
)
@pytest.mark.parametrize("rows", ROWS)
def test_matches_plain_softmax(rows, window, softcap, block):
    segments = ROWS[rows]
    positions = positions_of(segments)
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, T, heads, D)).astype(np.float32) for heads in (H, K, K))

    def ours(q, k, v):
        return reference.attention(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
            kv_positions_BS=positions, scale=0.3, window=window, softcap=softcap, sinks_H=None, block=block,
        )  # fmt: skip

    real = segments > 0
    out = np.asarray(jax.jit(ours)(q, k, v))
    assert np.isfinite(out).all()
    assert_close(out[real], plain(q, k, v, segments, positions, 0.3, window, softcap)[real], 1e-5)
    grads = jax.grad(lambda *qkv: jnp.where(real[:, :, None, None], ours(*qkv), 0).sum(), argnums=(0, 1, 2))(
        q, k, v
    )
    assert all(np.isfinite(g).all() for g in grads)
    assert all(np.abs(np.asarray(g)[~real]).max(initial=0) == 0 for g in grads), "padding has no gradient"


def test_the_gradient_through_a_softcap():
    """By central differences along a random direction, for queries, keys and values."""
    rng = np.random.default_rng(1)
    qkv = [rng.standard_normal((B, T, heads, D)).astype(np.float32) for heads in (H, K, K)]
    along = [rng.standard_normal(x.shape).astype(np.float32) for x in qkv]
    weights = rng.standard_normal((B, T, H, D))
    segments = ROWS["packed"]
    positions = positions_of(segments)

    def ours(*qkv):
        return (
            attention(
                *qkv, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
                kv_positions_BS=positions, scale=0.3, window=5, softcap=0.4,
            )[segments > 0] * weights[segments > 0].astype(np.float32)
        ).sum()  # fmt: skip

    def exact(step):
        moved = [x.astype(np.float64) + step * d for x, d in zip(qkv, along, strict=True)]
        return (plain(*moved, segments, positions, 0.3, 5, 0.4) * weights)[segments > 0].sum()

    grads = jax.grad(ours, argnums=(0, 1, 2))(*qkv)
    slope = sum(np.vdot(g, d) for g, d in zip(grads, along, strict=True))
    assert_close(slope, (exact(1e-5) - exact(-1e-5)) / 2e-5, 1e-4)


def test_blocks_keep_no_scores():
    """The backward pass of a long row keeps O(S x block), seen in what XLA says it needs."""
    S = 2048
    shapes = [jax.ShapeDtypeStruct((1, S, heads, 16), jnp.float32) for heads in (4, 2, 2)]
    where = np.ones((1, S), np.int32), np.arange(S, dtype=np.int32)[None]

    def loss(q, k, v, block):
        return reference.attention(
            q, k, v, q_segments_BT=where[0], kv_segments_BS=where[0], q_positions_BT=where[1],
            kv_positions_BS=where[1], scale=0.3, window=None, softcap=None, sinks_H=None, block=block,
        ).sum()  # fmt: skip

    def temporary(block):
        compiled = (
            jax.jit(jax.grad(lambda *qkv: loss(*qkv, block), argnums=(0, 1, 2))).lower(*shapes).compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(128) < temporary(S) / 4
