"""What every precision must do: one table of formats, one set of laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant
from jax.sharding import PartitionSpec as P

from jaxtune import quant
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.sharding import param_shardings
from jaxtune.quant import Float8, FourBit, Int8
from tests.kit.compare import assert_close, assert_trees_equal, relative_rms

# format, bytes a weight for large matrices at most, relative error of normal weights at most
FORMATS = [
    (FourBit("nf4"), 0.53, 0.10),
    (FourBit("nf4", double=False), 0.57, 0.10),
    (FourBit("fp4"), 0.53, 0.13),
    (FourBit("fp4", double=False), 0.57, 0.13),
    (Int8(), 1.01, 0.01),
    (Float8(), 1.01, 0.03),
    (Float8(128), 1.01, 0.03),
]
SHAPES = [(128, 256), (256, 192), (48, 50)]

formats = pytest.mark.parametrize("format", [f for f, *_ in FORMATS], ids=lambda f: f.name)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


quantize = jax.jit(quant.quantize, static_argnums=1)
dequantize = jax.jit(quant.dequantize)
product = jax.jit(quant.matmul)


def weight(shape, seed=0):
    return 0.05 * jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("format, size, error", FORMATS, ids=lambda p: getattr(p, "name", ""))
def test_size_and_error(format, size, error):
    w = weight((512, 1024))
    packed = quantize(w, format)
    assert quant.bytes_per_weight(packed) <= size
    assert relative_rms(dequantize(packed), w) <= error
    assert packed.format == format


@formats
@shapes
def test_product_and_gradient_are_those_of_the_dequantised_weight(format, shape):
    packed = quantize(weight(shape), format)
    x = jax.random.normal(jax.random.key(1), (3, 5, shape[1]))
    dy = jax.random.normal(jax.random.key(2), (3, 5, shape[0]))
    ours, pullback = jax.vjp(lambda x: product(x, packed), x)
    plain, plain_pullback = jax.vjp(lambda x: product(x, dequantize(packed)), x)
    assert_close(ours, plain, 1e-6)
    assert_close(pullback(dy)[0], plain_pullback(dy)[0], 1e-6)
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback))
    assert kept <= packed.nbytes, "residuals are packed"


@formats
def test_under_jit_vmap_and_scan(format):
    stacked = quantize(weight((2, 128, 256)), format)
    x = jax.random.normal(jax.random.key(1), (4, 256)).astype(jnp.bfloat16)
    _, scanned = jax.jit(lambda x, w: jax.lax.scan(lambda _, w: (None, quant.matmul(x, w)), None, w))(
        x, stacked
    )
    each = [product(x, quantize(one, format)) for one in weight((2, 128, 256))]
    assert scanned.dtype == jnp.bfloat16
    assert_close(scanned.astype(jnp.float32), jnp.stack(each).astype(jnp.float32), 1e-2)
    mapped = jax.jit(jax.vmap(quant.matmul, (0, None)))(x, jax.tree.map(lambda a: a[0], stacked))
    assert_close(mapped.astype(jnp.float32), scanned[0].astype(jnp.float32), 1e-2)


@formats
def test_leading_axes_are_stacked_weights(format):
    w = weight((3, 128, 192))
    stacked = quantize(w, format)
    assert stacked.shape == w.shape and stacked.leading == (3,)
    assert_trees_equal(jax.tree.map(lambda a: a[1], stacked), quantize(w[1], format))
    promised = quant.abstract(w.shape, w.dtype, format)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), stacked) == jax.tree.map(
        lambda a: (a.shape, a.dtype), promised
    )


@formats
def test_zeros_stay_zeros(format):
    assert not np.any(dequantize(quantize(jnp.zeros((128, 128)), format)))


@formats
def test_shards_hold_their_part(format):
    w = quantize(weight((2, 256, 512)), format)
    params = {"layers": {"0": {"q_proj": {"weight": w}}}}
    shardings = param_shardings(params, make_mesh(fsdp=2, tensor=2))
    placed = jax.device_put(params, shardings)["layers"]["0"]["q_proj"]["weight"]
    assert placed.codes.sharding.spec == P(None, "tensor", "fsdp")
    assert placed.codes.addressable_shards[0].data.size * 4 == placed.codes.size
    np.testing.assert_array_equal(dequantize(placed), dequantize(w))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_int8_is_bitsandbytes_own(dtype):
    """Row-wise absmax; in 16 bits bitsandbytes rounds the product to 16 bits before it rounds to a code, we do not."""
    w = np.array(weight((64, 192)))
    theirs = torch.from_numpy(w).to(getattr(torch, dtype))
    codes, absmax, _ = int8_vectorwise_quant(theirs.clone())
    ours = quantize(jnp.asarray(theirs.float().numpy()), Int8())
    np.testing.assert_array_equal(np.asarray(ours.scales).reshape(-1), absmax.numpy())
    off = np.abs(np.asarray(ours.codes, np.int32) - codes.numpy())
    assert off.max() <= (0 if dtype == "float32" else 1)
    same = quant.Int8Array(jnp.asarray(codes.numpy()), ours.scales, ours.out_in, "float32")
    np.testing.assert_array_equal(dequantize(same), int8_vectorwise_dequant(codes, absmax).numpy())
