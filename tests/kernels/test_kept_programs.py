"""A program has one text, whichever kernels the process has lowered before: the compilation cache finds it by that."""

import jax
import jax.numpy as jnp
import pytest

from jaxtune.kernels import nf4
from jaxtune.kernels.attention import mosaic_gpu as attention
from jaxtune.kernels.nf4 import mosaic_gpu as dequantising


def attends(length, window):
    def gradients(q, k, segments):
        out = lambda q: attention.attention(
            q, k, k, segments_BT=segments, scale=1.0, window=window, softcap=None, packed=False
        )[0]
        return jax.vjp(out, q)[1](q)

    q, k = (jax.ShapeDtypeStruct((1, length, heads, 128), jnp.bfloat16) for heads in (2, 1))
    return jax.jit(gradients).trace(q, k, jax.ShapeDtypeStruct((1, length), jnp.int32))


def unpacks():
    shape = (256, 128)
    layers = jax.eval_shape(lambda: [array[None] for array in nf4.quantize(jnp.zeros(shape))])
    first = lambda *layers: dequantising.dequantize_layer(
        layers, 0, shape=shape, dtype=jnp.dtype("bfloat16"), values="nf4"
    )
    return jax.jit(first).trace(*layers)


@pytest.mark.parametrize(
    "trace", [lambda: attends(256, None), lambda: attends(256, 64), unpacks], ids=["one pass", "two", "nf4"]
)
def test_has_one_text(trace):
    lower = lambda: trace().lower(lowering_platforms=("cuda",)).as_text()
    first = lower()
    assert "@mosaic_gpu" in first
    attends(512, None).lower(lowering_platforms=("cuda",))
    jax.clear_caches()
    assert lower() == first
