"""`matmul` is dequantise-then-multiply in value and gradient, and keeps nothing but packed arrays in between."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import nf4
from tests.kit.compare import assert_close

CASES = [(128, 256), (256, 192), (48, 50)]


def make(out_in, seed=0):
    w = jax.random.normal(jax.random.key(seed), out_in)
    return nf4.quantize(w), jax.random.normal(jax.random.key(seed + 1), (3, 5, out_in[1]))


@pytest.mark.parametrize("out_in", CASES)
def test_value_and_gradient(out_in):
    packed, x = make(out_in)
    w = nf4.dequantize(packed, shape=out_in, dtype="float32")
    dy = jax.random.normal(jax.random.key(9), (3, 5, out_in[0]))
    ours, pullback = jax.vjp(lambda x: nf4.matmul(x, packed, out_in), x)
    plain, plain_pullback = jax.vjp(lambda x: x @ w.T, x)
    assert_close(ours, plain, 1e-6)
    assert_close(pullback(dy)[0], plain_pullback(dy)[0], 1e-6)


@pytest.mark.parametrize("out_in", CASES)
def test_residuals_are_packed(out_in):
    packed, x = make(out_in)
    _, pullback = jax.vjp(lambda x: nf4.matmul(x, packed, out_in), x)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= sum(leaf.nbytes for leaf in packed)


def test_under_jit_vmap_and_scan():
    packed, x = make((128, 256))
    expected = nf4.matmul(x, packed, (128, 256))
    over = jax.jit(jax.vmap(lambda row: nf4.matmul(row, packed, (128, 256))))(x)
    assert_close(over, expected, 1e-6)
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), packed)
    _, scanned = jax.lax.scan(lambda c, w: (c, nf4.matmul(x, w, (128, 256))), 0, stacked)
    assert_close(scanned[1], expected, 1e-6)


def test_16_bit_products_come_out_in_16_bits():
    packed, x = make((128, 256))
    assert nf4.matmul(x.astype(jnp.bfloat16), packed, (128, 256)).dtype == jnp.bfloat16
    np.testing.assert_equal(nf4.dequantize(packed, shape=(128, 256), dtype="bfloat16").dtype, jnp.bfloat16)
