"""The kernel that dequantises, on a machine without its GPU: in Pallas' interpreter it gives the reference's bits, for
CUDA it lowers at the shapes of real models. `tests/gpu` runs it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import gpu, nf4
from jaxtune.kernels.nf4 import mosaic_gpu
from tests.kit.compare import assert_close

BF16 = jnp.dtype("bfloat16")


def pack(shape, layers=1, **how):
    w = jax.random.normal(jax.random.key(0), (layers, *shape))
    return jax.vmap(functools.partial(nf4.quantize, **how))(w)


@pytest.fixture
def interpreted(monkeypatch):
    """As if the machine had the GPU."""
    monkeypatch.setattr(gpu, "why_not_mosaic", lambda: None)
    kernel = mosaic_gpu.dequantize_layer
    monkeypatch.setattr(mosaic_gpu, "dequantize_layer", functools.partial(kernel, interpret=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("values", ["nf4", "fp4"])
def test_each_layer_of_a_stack_has_the_references_bits(interpreted, values, dtype):
    shape, stack = (64, 512), pack((64, 512), layers=2, values=values)
    settings = dict(shape=shape, dtype=jnp.dtype(dtype), values=values)
    for index in range(2):
        layer = nf4.Packed(*(array[index] for array in stack))
        expected = nf4.dequantize(layer, **settings, implementation="xla")
        np.testing.assert_array_equal(mosaic_gpu.dequantize_layer(stack, index, **settings), expected)


def test_product_and_gradient(interpreted):
    shape = (128, 128)
    packed = jax.tree.map(lambda array: array[0], pack(shape))
    x, dy = (jax.random.normal(jax.random.key(i), (3, 128), jnp.bfloat16) for i in (1, 2))

    def both(implementation):
        y, pullback = jax.vjp(lambda x: nf4.matmul(x, packed, shape, implementation=implementation), x)
        return y, pullback(dy)[0]

    for ours, theirs in zip(both("mosaic_gpu"), both("xla"), strict=True):
        assert_close(ours.astype(jnp.float32), theirs.astype(jnp.float32), 1e-6)


@pytest.mark.parametrize(
    ("shape", "how", "why"),
    [
        ((128, 2880), dict(), "whole tiles"),  # an odd number of blocks a row
        ((256, 576), dict(), "whole tiles"),
        ((128, 4304), dict(), "whole tiles"),  # blocks cross rows
        ((100, 128), dict(), "whole tiles"),  # the last group of scales is short
        ((128, 128), dict(double=False), "double-quantised"),
    ],
)
def test_other_cases_are_xlas(interpreted, shape, how, why):
    packed = jax.tree.map(lambda array: array[0], pack(shape, **how))
    ours = nf4.dequantize(packed, shape=shape, dtype=BF16)
    np.testing.assert_array_equal(ours, nf4.dequantize(packed, shape=shape, dtype=BF16, implementation="xla"))
    with pytest.raises(NotImplementedError, match=why):
        nf4.dequantize(packed, shape=shape, dtype=BF16, implementation="mosaic_gpu")


def test_32_bits_are_xlas():
    assert "16 bits" in mosaic_gpu.why_not((128, 128), jnp.dtype("float32"), True)


def test_what_the_machine_lacks(monkeypatch):
    assert "9.0" in gpu.why_not_mosaic()
    monkeypatch.setattr(gpu, "capability", lambda: 9.0)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert gpu.why_not_mosaic() is None
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert "several devices" in gpu.why_not_mosaic()
    monkeypatch.setattr(gpu, "capability", lambda: 8.9)
    packed = jax.tree.map(lambda array: array[0], pack((128, 128)))
    with pytest.raises(NotImplementedError, match=r"9\.0"):
        nf4.matmul(jnp.zeros((1, 128), BF16), packed, (128, 128), implementation="mosaic_gpu")


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_lowers_for_cuda(shape):
    """In a loop over layers, whose index is an operand: the stacks themselves are the kernel's."""
    stack = jax.eval_shape(lambda: pack(shape, layers=3))

    def sums(stack):
        one = lambda _, index: (
            None,
            mosaic_gpu.dequantize_layer(stack, index, shape=shape, dtype=BF16, values="nf4").sum(),
        )
        return jax.lax.scan(one, None, jnp.arange(3))[1]

    text = jax.jit(sums).trace(stack).lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "mosaic_gpu" in line and "custom_call" in line)
    groups = shape[0] * shape[1] // (256 * 64)
    assert f"tensor<3x{groups}x128x64xui8>" in call


def test_lowers_for_cuda_under_vmap_and_remat():
    stack = jax.eval_shape(lambda: pack((256, 128), layers=3))

    @jax.checkpoint
    def product(x, packed):
        w = mosaic_gpu.dequantize_layer(
            [array[None] for array in packed], 0, shape=(256, 128), dtype=BF16, values="nf4"
        )
        return (x @ w.T).astype(jnp.float32).sum()

    gradients = jax.vmap(jax.grad(product), (None, 0))
    jax.jit(gradients).trace(jnp.zeros((4, 128), BF16), stack).lower(lowering_platforms=("cuda",))
