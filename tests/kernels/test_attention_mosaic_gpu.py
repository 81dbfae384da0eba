"""The kernels of attention, on a machine without their GPU: in Pallas' interpreter they give the definition's values
and gradients, for CUDA they lower at the shapes of real models. `tests/gpu` runs them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import gpu
from jaxtune.kernels.attention import api, attention, mosaic_gpu
from jaxtune.kernels.attention.intervals import intervals
from jaxtune.kernels.attention.tiles import blocks
from tests.kit.compare import assert_close
from tests.kit.kernel_cases import plain_attention

ROWS = {
    "one segment a row": [[256]],
    "packed, lengths off the blocks": [[3, 67, 1, 59, 70, 56]],
    "padding, and a segment of all tiles": [[1, 249], [40]],
}


def layout(lengths):
    """Segments and positions of the rows, [B, T]."""
    segments, positions = np.zeros((2, len(lengths), max(map(sum, lengths))), np.int32)
    for row, line in enumerate(lengths):
        for i, (end, length) in enumerate(zip(np.cumsum(line), line, strict=True)):
            segments[row, end - length : end], positions[row, end - length : end] = i + 1, np.arange(length)
    return segments, positions


def draw(segments, heads, kv_heads, size, dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (*segments.shape, h, size), dtype)
        for key, h in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, q, k, v, dout, segments):
    """Of real tokens; padding has no gradient. (Compiled: the interpreter can hang while others dispatch.)"""
    real = (segments > 0)[:, :, None, None]
    out, pull = jax.vjp(lambda q, k, v: jnp.where(real, attend(q, k, v), 0), q, k, v)
    return out, *pull(dout.astype(out.dtype))


@pytest.mark.parametrize(
    ("rows", "heads", "size", "form"),
    [
        ("one segment a row", (2, 1), 64, {}),
        ("one segment a row", (1, 1), 128, {"window": 100, "softcap": 2.0}),
        ("packed, lengths off the blocks", (2, 2), 96, {"softcap": 2.0}),
        ("packed, lengths off the blocks", (1, 1), 64, {"window": 20}),
        ("padding, and a segment of all tiles", (2, 1), 256, {}),
        ("padding, and a segment of all tiles", (1, 1), 64, {"window": 2}),
    ],
)
def test_equals_the_definition(rows, heads, size, form):
    check(rows, heads, size, form, packed=True)


@pytest.mark.parametrize(
    ("rows", "heads", "form"),
    [
        ("packed, lengths off the blocks", (2, 1), {}),  # (promised or not, the layout is seen)
        ("padding, and a segment of all tiles", (2, 2), {"softcap": 2.0}),
    ],
)
def test_all_gradients_at_once_equal_the_definition(rows, heads, form):
    assert blocks(128, packed=False, windowed=False).at_once
    check(rows, heads, 128, form, packed=False)


def check(rows, heads, size, form, packed):
    segments, positions = layout(ROWS[rows])
    drawn, scale = draw(segments, *heads, size), size**-0.5

    def ours(q, k, v):
        settings = {"window": None, "softcap": None, **form, "packed": packed, "interpret": True}
        return mosaic_gpu.attention(q, k, v, segments_BT=segments, scale=scale, **settings)[0]

    def exact(q, k, v):
        return plain_attention(q, k, v, segments, positions, scale, **form)

    found = value_and_gradients(ours, *drawn, segments)
    expected = value_and_gradients(exact, *(x.astype(jnp.float32) for x in drawn), segments)
    for mine, theirs in zip(found, expected, strict=True):
        assert np.isfinite(np.asarray(mine, np.float32)).all()
        assert_close(mine.astype(jnp.float32), theirs, 1e-2)


def test_sinks_join_through_the_denominators():
    """The whole of the gradient with respect to what their logarithm is reduced to."""
    segments, positions = layout([[100, 28]])
    q, k, v, dout = draw(segments, 2, 1, 64)
    sinks = jnp.array([1.5, -0.5])

    def ours(q, k, v, sinks):
        settings = dict(segments_BT=segments, scale=0.2, window=None, softcap=None, interpret=True)
        return api.with_sinks(*mosaic_gpu.attention(q, k, v, **settings), sinks)

    def exact(q, k, v, sinks):
        return plain_attention(q, k, v, segments, positions, 0.2, sinks=sinks)

    out, pull = jax.vjp(ours, q, k, v, sinks)
    right, right_pull = jax.vjp(exact, *(x.astype(jnp.float32) for x in (q, k, v)), sinks)
    for mine, theirs in zip((out, *pull(dout)), (right, *right_pull(dout.astype(jnp.float32))), strict=True):
        assert_close(mine.astype(jnp.float32), theirs, 1e-2)


@pytest.mark.parametrize(
    ("over", "size", "packed"), [("batch", 64, True), ("heads", 64, True), ("batch", 128, False)]
)
def test_under_vmap_and_shard_map(over, size, packed):
    """The same bits as one after the other. (The interpreter has one device; `tests/gpu` cuts among two.)"""
    segments, _ = layout([[100, 28]])
    q, k, v, dout = (jnp.concatenate([x, 2 * x]) for x in draw(segments, 4, 2, size))
    settings = dict(scale=0.2, window=None, softcap=None, packed=packed, interpret=True)

    def both(q, k, v, dout):
        attend = lambda *qkv: mosaic_gpu.attention(
            *qkv, segments_BT=np.tile(segments, (len(q), 1)), **settings
        )[0]
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(dout)

    axis = {"batch": 0, "heads": 2}[over]
    given = (q, k, v, dout)
    halves = [both(*(jnp.split(x, 2, axis)[i] for x in given)) for i in range(2)]
    one_by_one = [np.asarray(jnp.concatenate(pair, axis)) for pair in zip(*halves, strict=True)]
    stacked = [jnp.stack(jnp.split(x, 2, axis)) for x in given]
    mapped = [jnp.concatenate(list(each), axis) for each in jax.vmap(both)(*stacked)]
    spec = jax.P(*[None] * axis, "cut")
    mesh = jax.make_mesh((1,), ("cut",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(*given)
    for found in (mapped, cut):
        for mine, theirs in zip(found, one_by_one, strict=True):
            np.testing.assert_array_equal(np.asarray(mine), theirs)


def test_the_logarithm_of_the_denominators_and_its_gradient():
    segments, _ = layout([[100, 28]])
    q, k, v, _ = draw(segments, 2, 1, 64)
    weights = jax.random.normal(jax.random.key(1), (1, 2, 128))

    def ours(q, k):
        settings = dict(segments_BT=segments, scale=0.2, window=None, softcap=None, interpret=True)
        return mosaic_gpu.attention(q, k, v, **settings)[1]

    def exact(q, k):
        scores = 0.2 * jnp.einsum("bthd,bskd->bhts", q, k)
        visible = (segments[:, :, None] == segments[:, None]) & np.tri(128, dtype=bool)
        return jax.nn.logsumexp(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)

    for f, given in ((ours, (q, k)), (exact, (q.astype(jnp.float32), k.astype(jnp.float32)))):
        lse, pull = jax.vjp(f, *given)
        results = [lse, *pull(weights)]
        if f is ours:
            found = results
    for mine, theirs in zip(found, results, strict=True):
        assert_close(mine.astype(jnp.float32), theirs, 1e-2)


def test_each_token_sees_from_its_first_key_on():
    segments = np.array([[0, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    assert intervals(segments, None).first.tolist() == [1, 1, 1, 1, 4, 4, 7, 8, *[8] * 8]
    assert intervals(segments, 2).first.tolist() == [1, 1, 1, 2, 4, 4, 7, 8, 8, 8, 9, 10, 11, 12, 13, 14]


def test_blocks_that_nobody_sees_are_left_out():
    """Of 64 queries, or keys, at a time: from which block on, between which all is seen of all, and to which."""
    seen = intervals(np.repeat(np.arange(1, 5), 128)[None], None)
    assert seen.blocks(64, 128).tolist() == [[i, i, i, i + 1] for i in (0, 0, 1, 1, 2, 2, 3, 3)]
    assert seen.blocks(64, 64).tolist()[2:4] == [[2, 2, 2, 3], [2, 2, 3, 4]]
    assert seen.blocks_by(64, 64).tolist()[2:4] == [[2, 3, 4, 4], [3, 4, 4, 4]]
    whole = intervals(np.ones((1, 256)), None)
    assert whole.blocks(64, 64).tolist() == [[0, 0, i, i + 1] for i in range(4)]
    assert whole.blocks_by(64, 64).tolist() == [[i, i + 1, 4, 4] for i in range(4)]
    window = intervals(np.ones((1, 512)), 129)
    assert window.blocks(64, 64).tolist()[5] == [3, 4, 5, 6]
    assert window.blocks_by(64, 64).tolist()[2] == [2, 3, 4, 5]


@pytest.mark.parametrize("softcap", [None, 50.0])
@pytest.mark.parametrize(
    ("size", "window", "kernels"),
    [(64, 1024, 3), (96, 1024, 3), (128, 1024, 3), (128, None, 2), (256, 1024, 4)],
)
def test_lowers_for_cuda(size, window, kernels, softcap):
    segments = jax.ShapeDtypeStruct((4, 4096), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((4, 4096, heads, size), jnp.bfloat16) for heads in (32, 8))

    def both(q, k, v, segments):
        attend = functools.partial(
            mosaic_gpu.attention,
            segments_BT=segments,
            scale=0.1,
            window=window,
            softcap=softcap,
            packed=False,
        )
        results, pull = jax.vjp(attend, q, k, v)
        return results, pull(results)

    text = jax.jit(both).trace(q, k, k, segments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") >= kernels


def test_what_it_does_not_do(monkeypatch):
    q, one = np.zeros((1, 8, 4, 64), jnp.bfloat16), np.array([[8]])
    assert mosaic_gpu.why_not(q, one) is None
    assert "layout" in mosaic_gpu.why_not(q, None)
    assert "float32" in mosaic_gpu.why_not(q.astype(np.float32), one)
    assert "heads of 36" in mosaic_gpu.why_not(q[..., :36], one)
    segments = np.ones((1, 8), np.int32)
    call = functools.partial(
        attention, q, q, q, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=segments,
        kv_positions_BS=segments, pieces_GM=one, scale=1.0, implementation="mosaic_gpu",
    )  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"9\.0"):
        call()
    monkeypatch.setattr(gpu, "why_not_mosaic", lambda: None)
    with pytest.raises(NotImplementedError, match="layout"):
        call(pieces_GM=None)


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("q", (2, 8, 4, 16), "as many rows"),
        ("v", (1, 8, 2, 8), "one head size"),
        ("q", (1, 8, 3, 16), "3 query heads are not a multiple of 2"),
        ("kv_segments_BS", (1, 7), "kv_segments are"),
        ("q_positions_BT", (1, 7), "q_positions are"),
    ],
)
def test_shapes_that_do_not_go_together(name, shape, said):
    given = {each: np.zeros((1, 8, heads, 16)) for each, heads in (("q", 4), ("k", 2), ("v", 2))}
    names = ("q_segments_BT", "kv_segments_BS", "q_positions_BT", "kv_positions_BS")
    given |= {each: np.ones((1, 8), np.int32) for each in names}
    given[name] = np.ones(shape, given[name].dtype)
    with pytest.raises(ValueError, match=said):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), scale=1.0, **given)
