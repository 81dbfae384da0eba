"""Every kernel case at its real size, from fresh random inputs: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/gpu`.

The header says the seed; JAXTUNE_TEST_SEED repeats one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4
from jaxtune.kernels.attention import api as attention_api
from jaxtune.kernels.attention import attention, mosaic_gpu
from jaxtune.kernels.choice import runnable
from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy
from jaxtune.kernels.nf4 import layout
from tests.kit import gpu_runs
from tests.kit.kernel_cases import (
    CASES,
    SEPARATE,
    Case,
    check,
    check_nan,
    compare,
    draw,
    over_implementations,
    plain_nll,
    run,
)

pytestmark = pytest.mark.gpu
SEED = gpu_runs.SEED


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "implementation"), over_implementations(CASES))
def test_equals_the_definition(case: Case, implementation: str, dtype: str):
    check(case, case.real, implementation, dtype, SEED)


@pytest.mark.parametrize(("case", "implementation"), over_implementations(SEPARATE))
def test_nan_is_seen_and_stays_in_its_row(case: Case, implementation: str):
    check_nan(case, case.real, implementation, "bfloat16", SEED)


# ---- arrays of more elements than 32 bits can count ----


def key(i: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(SEED), i)


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(key(i), shape, jnp.bfloat16)


def test_more_logits_than_32_bits_can_count():
    """All in one chunk; the definition is computed for 2500 tokens at a time."""
    T, D, V = 20_000, 256, 128_256
    assert T * V > 2**31
    x, w, labels = normal(0, T, D), normal(1, V, D) / 16, jax.random.randint(key(2), (T,), 0, V)

    def nll_and_gradient(loss, x):
        nll, pull = jax.vjp(loss, x)
        return nll, pull(jnp.ones_like(nll))[0]

    @jax.jit
    def ours(x):
        return nll_and_gradient(lambda x: linear_cross_entropy(x, w, labels, chunk=T), x)

    @jax.jit
    def exact(x, labels):
        return nll_and_gradient(lambda x: plain_nll(x.astype(jnp.float32), w, labels), x)

    found = ours(x)
    for start in range(0, T, 2500):
        here = slice(start, start + 2500)
        compare([each[here] for each in found], exact(x[here], labels[here]), 1e-2)


@pytest.mark.parametrize("implementation", runnable(nf4.api.IMPLEMENTATIONS))
def test_more_weights_than_32_bits_can_count(implementation: str):
    """A packed matrix: the bits of its first and last rows."""
    shape, few = (131_200, 16_384), 64
    assert shape[0] * shape[1] > 2**31
    specs = jax.eval_shape(nf4.quantize, jax.ShapeDtypeStruct(shape, jnp.bfloat16))
    packed = nf4.Packed(
        jax.random.bits(key(3), specs.codes.shape, jnp.uint8),
        jax.random.bits(key(4), specs.absmax.shape, jnp.uint8),
        jax.random.uniform(key(5), specs.nested_absmax.shape),
        jnp.float32(2),
    )
    groups = few * specs.absmax.shape[1] // layout.GROUP
    dequantize = functools.partial(
        nf4.dequantize, shape=shape, dtype="bfloat16", implementation=implementation
    )
    w = jax.jit(dequantize)(packed)
    for rows, scales in ((slice(few), slice(groups)), (slice(-few, None), slice(-groups, None))):
        part = packed._replace(
            codes=packed.codes[rows], absmax=packed.absmax[rows], nested_absmax=packed.nested_absmax[scales]
        )
        exact = nf4.dequantize(part, shape=(few, shape[1]), dtype="bfloat16", implementation="xla")
        np.testing.assert_array_equal(np.asarray(w[rows], np.float32), np.asarray(exact, np.float32))


def without_xla() -> list[str]:
    """XLA would take too long for long rows."""
    return [name for name in runnable(attention_api.IMPLEMENTATIONS) if name != "xla"]


def attend_one_row(q, k, v, implementation):
    T = q.shape[1]
    segments, positions = jnp.ones((1, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None]
    return attention(
        q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions, kv_positions_BS=positions,
        pieces_GM=jnp.array([[T]]), scale=q.shape[-1] ** -0.5, implementation=implementation,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", without_xla())
def test_more_queries_than_32_bits_can_count(implementation: str):
    """One long row: its last token, which sees all of it, in the heads that share the last keys."""
    T, H, K, D = 262_400, 64, 8, 128
    assert T * H * D > 2**31
    q, k, v = normal(6, 1, T, H, D), normal(7, 1, T, K, D), normal(8, 1, T, K, D)
    ours = jax.jit(functools.partial(attend_one_row, implementation=implementation))
    q_HD, k_SD, v_SD = (x.astype(jnp.float32) for x in (q[0, -1, -(H // K) :], k[0, :, -1], v[0, :, -1]))
    exact = jax.nn.softmax(D**-0.5 * q_HD @ k_SD.T, axis=-1) @ v_SD
    compare(ours(q, k, v)[0, -1, -(H // K) :], exact, 1e-2)


@pytest.mark.parametrize("implementation", without_xla())
def test_the_gradients_of_a_row_of_128k_tokens(implementation: str):
    T, H, K, D = 131_072, 2, 1, 128
    q, k, v, dout = (
        normal(9, 1, T, H, D),
        normal(10, 1, T, K, D),
        normal(11, 1, T, K, D),
        normal(12, 1, T, H, D),
    )

    @functools.partial(jax.jit, static_argnames="by")
    def gradients(q, k, v, dout, by):
        out, pull = jax.vjp(functools.partial(attend_one_row, implementation=by), q, k, v)
        return out, *pull(dout)

    exact = gradients(*(x.astype(jnp.float32) for x in (q, k, v, dout)), by="xla")
    compare(gradients(q, k, v, dout, by=implementation), exact, 1e-2)


@pytest.mark.parametrize("case", [case for case in CASES if case.op == attention_api.NAME], ids=str)
def test_our_attention_gives_the_same_bits_twice(case: Case):
    inputs = draw(case, case.real, "bfloat16", SEED)
    once, again = (run(case, inputs, "mosaic_gpu") for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, once, again)


@pytest.mark.skipif(jax.device_count() < 2, reason="of two GPUs")
@pytest.mark.parametrize("axis", [0, 2], ids=["batch", "heads"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "whole"])
def test_our_attention_is_cut_among_two_devices(axis: int, packed: bool):
    q, k, v, dout = (
        normal(13, 4, 1024, 8, 128),
        normal(14, 4, 1024, 2, 128),
        normal(15, 4, 1024, 2, 128),
        normal(16, 4, 1024, 8, 128),
    )

    def both(q, k, v, dout):
        attend = lambda *qkv: mosaic_gpu.attention(
            *qkv,
            segments_BT=jnp.ones(q.shape[:2], jnp.int32),
            scale=0.1,
            window=None,
            softcap=None,
            packed=packed,
        )
        (out, _), pull = jax.vjp(attend, q, k, v)
        return out, *pull((dout, jnp.zeros((len(q), q.shape[2], q.shape[1]))))

    spec = jax.P(*[None] * axis, "cut")
    mesh = jax.make_mesh((2,), ("cut",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        q, k, v, dout
    )
    jax.tree.map(np.testing.assert_array_equal, cut, jax.jit(both)(q, k, v, dout))
