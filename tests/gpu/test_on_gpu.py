"""What must hold on an NVIDIA GPU as it does on a CPU: `JAX_PLATFORMS=cuda,cpu pytest -m gpu tests/gpu`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import implementations
from jaxtune.kernels import nf4 as kernel
from jaxtune.kernels.attention import attention
from jaxtune.kernels.nf4 import layout
from jaxtune.quant import nf4
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.remat import LEVELS, remat
from jaxtune.training.step import value_and_grad
from tests.kit import tiny
from tests.kit.compare import assert_close, assert_trees_close, assert_trees_equal

pytestmark = pytest.mark.gpu


def on_cpu(function, *args):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.device_get(jax.jit(function)(*jax.device_get(args)))


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 14336), (256, 192)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nf4_has_the_same_bits(shape, dtype):
    """Codes are exact. A scale's byte may move by one where the mean of all scales differs in its last bit."""
    w = np.asarray(jax.random.normal(jax.random.key(0), shape), np.float32).astype(jnp.dtype(dtype))
    ours, theirs = jax.jit(nf4.quantize)(jnp.asarray(w)), on_cpu(nf4.quantize, w)
    np.testing.assert_array_equal(ours.codes, theirs.codes)
    np.testing.assert_allclose(ours.offset, theirs.offset, rtol=1e-6)
    off = np.abs(np.asarray(ours.absmax, np.int32) - np.asarray(theirs.absmax, np.int32))
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.005
    assert_trees_equal(
        jax.jit(lambda w: w.dequantize())(jax.device_put(theirs)), on_cpu(lambda w: w.dequantize(), theirs)
    )


@pytest.mark.parametrize("shape", [(1024, 4096), (4096, 14336), (14336, 4096)])
@pytest.mark.parametrize("values", ["nf4", "fp4"])
def test_the_kernel_dequantises_to_the_same_bits(shape, values):
    """Whatever the codes: all bytes, all entries of the scales' map."""
    (out, inn), keys = shape, jax.random.split(jax.random.key(0), 3)
    packed = kernel.Packed(
        jax.random.bits(keys[0], (out, inn // 2), jnp.uint8),
        jax.random.bits(keys[1], (out, inn // 64), jnp.uint8),
        jax.random.uniform(keys[2], (out * inn // 16384,), minval=1e-3, maxval=0.1),
        jnp.float32(0.03),
    )
    of = lambda implementation: jax.jit(
        lambda packed: kernel.dequantize(
            packed, shape=shape, dtype="bfloat16", values=values, implementation=implementation
        )
    )
    np.testing.assert_array_equal(
        *(np.asarray(of(name)(packed)).view(np.uint16) for name in ("mosaic_gpu", "xla"))
    )


def test_nf4_of_float32_weights_differs_only_on_edges():
    """XLA's division on a GPU is not correctly rounded: a weight within a rounding error of the middle between two
    values may get the other one. 16-bit weights, which is what checkpoints hold, are not that close to any middle."""
    w = np.asarray(jax.random.normal(jax.random.key(0), (4096, 4096)), np.float32)
    ours, theirs = jax.jit(nf4.quantize)(jnp.asarray(w)), on_cpu(nf4.quantize, w)
    ours, theirs = (np.asarray(layout.unpack(x.codes, x.out_in), np.int32) for x in (ours, theirs))
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() <= 1e-6


@pytest.mark.parametrize("length", [512, 2048])
def test_attention_in_bfloat16(length):
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, h, 128)) for i, h in enumerate((8, 2, 2)))
    segments = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2]), length // 2), (2, length)).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.tile(jnp.arange(length // 2), 2), (2, length)).astype(jnp.int32)

    def attend(q, k, v):
        return attention(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
            kv_positions_BS=positions, scale=128**-0.5,
        )  # fmt: skip

    exact = jax.jit(attend)(q, k, v)
    rounded = jax.jit(attend)(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert_close(rounded.astype(jnp.float32), exact, 1e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 100], ids=["all", "window"])
@pytest.mark.parametrize(
    "lengths", [[[1000], [1024]], [[300, 500, 200, 24], [1, 400, 0, 0]]], ids=["one segment a row", "packed"]
)
def test_cudnn_attends_as_xla_does(lengths, window, head_dim):
    """Output and gradients of real tokens, to what 16 bits allow; padding is finite and has no gradient."""
    lengths = np.array(lengths, np.int32)
    segments, positions = np.zeros((2, 2, 1024), np.int32)
    for row, line in enumerate(lengths):
        ends = np.cumsum(line)
        for i, (end, length) in enumerate(zip(ends, line, strict=True)):
            segments[row, end - length : end], positions[row, end - length : end] = i + 1, np.arange(length)
    real = jnp.asarray(segments > 0)[:, :, None, None]
    q, k, v, w = (
        jax.random.normal(jax.random.key(i), (2, 1024, h, head_dim), jnp.bfloat16)
        for i, h in enumerate((8, 2, 2, 8))
    )

    def of(implementation):
        def loss(q, k, v):
            out = attention(
                q, k, v, q_segments_BT=segments, kv_segments_BS=segments, q_positions_BT=positions,
                kv_positions_BS=positions, scale=head_dim**-0.5, window=window, lengths_BM=jnp.asarray(lengths),
                implementation=implementation,
            )  # fmt: skip
            return jnp.where(real, out.astype(jnp.float32) * w.astype(jnp.float32), 0).sum(), jnp.where(
                real, out, 0
            )

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))

    ((_, out), grads) = of("cudnn")(q, k, v)
    exact = of("xla")(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert_close(out.astype(jnp.float32), exact[0][1], 1e-2)
    for ours, theirs in zip(grads, exact[1], strict=True):
        assert_close(ours.astype(jnp.float32), theirs, 1e-2)
        assert not np.asarray(jnp.where(segments[:, :, None, None] > 0, 0, ours), np.float32).any()


def test_cudnn_is_what_a_step_uses():
    assert implementations()["attention"] == "cudnn"
    model = tiny.model()
    batch = {name: jnp.asarray(each[0]) for name, each in tiny.batch().items()}
    batch["segment_lengths"] = jnp.full((len(batch["tokens"]), 2), batch["tokens"].shape[1] // 2, jnp.int32)
    loss = next_token_loss(model)
    lowered = jax.jit(jax.grad(loss)).lower(tiny.lora(model), tiny.params(model, "bfloat16"), batch)
    assert "cudnn" in lowered.as_text()


@pytest.mark.parametrize("name", LEVELS)
def test_loss_and_gradient_equal_the_cpus(name):
    """Every level of remat, offloading to the host's memory included."""
    model = tiny.model()
    params, lora, batch = tiny.params(model), tiny.lora(model), tiny.batch()
    loss = next_token_loss(model, remat(name))
    ours = jax.jit(lambda *args: value_and_grad(unwatched(loss), *args))(lora, params, batch)
    theirs = on_cpu(
        lambda *args: value_and_grad(unwatched(next_token_loss(model)), *args), lora, params, batch
    )
    assert_close(ours[0], theirs[0], 1e-5)
    assert_trees_close(jax.device_get(ours[1]), theirs[1], 1e-4)
