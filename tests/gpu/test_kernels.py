"""Every kernel case at its real size, from fresh random inputs: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/gpu`.

The header says the seed; JAXTUNE_TEST_SEED repeats one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4
from jaxtune.kernels.attention import attention, cudnn
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
    over_implementations,
    plain_nll,
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


@pytest.mark.skipif(cudnn.why_not_here() is not None, reason="without cuDNN it would take too long")
def test_more_queries_than_32_bits_can_count():
    """One long row: its last token, which sees all of it, in the heads that share the last keys."""
    T, H, K, D = 262_400, 64, 8, 128
    assert T * H * D > 2**31
    q, k, v = normal(6, 1, T, H, D), normal(7, 1, T, K, D), normal(8, 1, T, K, D)
    segments, positions = jnp.ones((1, T), jnp.int32), jnp.arange(T, dtype=jnp.int32)[None]

    @jax.jit
    def ours(q, k, v):
        return attention(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
            kv_positions_BS=positions, pieces_GM=jnp.array([[T]]), scale=D**-0.5, implementation="cudnn",
        )  # fmt: skip

    q_HD, k_SD, v_SD = (x.astype(jnp.float32) for x in (q[0, -1, -(H // K) :], k[0, :, -1], v[0, :, -1]))
    exact = jax.nn.softmax(D**-0.5 * q_HD @ k_SD.T, axis=-1) @ v_SD
    compare(ours(q, k, v)[0, -1, -(H // K) :], exact, 1e-2)
