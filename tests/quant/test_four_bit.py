"""NF4 and FP4 are bitsandbytes': the same codes, scales and values, bit for bit; only the order of nibbles differs."""

import dataclasses

import bitsandbytes.functional as bnb
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from jaxtune import quant
from jaxtune.kernels.nf4 import layout
from jaxtune.quant import FourBit, nf4

SHAPES = [(512, 1024), (2048, 512), (256, 192), (48, 50), (7, 64)]
DTYPES = ["float32", "bfloat16", "float16"]
CASES = [(FourBit(), shape, dtype) for shape in SHAPES for dtype in DTYPES] + [
    (FourBit(values, double), shape, dtype)
    for values, double in (("nf4", False), ("fp4", False), ("fp4", True))
    for shape, dtype in (((512, 1024), "bfloat16"), ((256, 192), "float32"), ((47, 51), "float16"))
]


def random_weight(shape, dtype, seed=0):
    """Normal weights with a block of zeros, an outlier, a constant block and a denormal-sized one."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32) * 0.05
    flat = w.reshape(-1)
    flat[:64] = 0
    flat[100] = 3.0
    flat[128:192] = 0.25
    flat[192:256] *= 1e-6
    return w.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def torch_quantize(w, kind):
    tensor = torch.from_numpy(w.astype(np.float32)).to(getattr(torch, w.dtype.name))
    return bnb.quantize_4bit(tensor, compress_statistics=kind.double, quant_type=kind.values)


def torch_codes(packed, size):
    """bitsandbytes' bytes -> codes in the weight's own order."""
    byte = packed.numpy().reshape(-1)
    return np.stack([byte >> 4, byte & 15], -1).reshape(-1)[:size]


def our_codes(w: quant.FourBitArray):
    out, inn = w.out_in
    return np.asarray(layout.unpack(w.codes, w.out_in)).reshape(-1)[: out * inn]


@pytest.fixture(scope="module", params=CASES, ids=lambda p: f"{p[0].name}-{p[1]}-{p[2]}")
def both(request):
    kind, shape, dtype = request.param
    w = random_weight(shape, dtype)
    return w, jax.jit(kind.quantize)(jnp.asarray(w)), *torch_quantize(w, kind)


def test_constants_are_bitsandbytes_own():
    np.testing.assert_array_equal(layout.DYNAMIC_MAP, bnb.create_dynamic_map().numpy())
    for name, table in layout.TABLES.items():
        np.testing.assert_array_equal(table, bnb.get_4bit_type(name, device="cpu").numpy())
        assert table[layout.ZERO_CODES[name]] == 0


def test_codes_are_equal(both):
    w, ours, packed, _ = both
    np.testing.assert_array_equal(our_codes(ours), torch_codes(packed, w.size))


def test_scales_are_equal(both):
    """Bytes may differ by one in 0.5% of blocks: the offset is a mean, whose last bit hangs on the order of adding."""
    _, ours, _, state = both
    if not ours.format.double:
        np.testing.assert_array_equal(np.asarray(ours.absmax).reshape(-1), state.absmax.numpy())
        return
    np.testing.assert_allclose(ours.offset, state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.nested_absmax, state.state2.absmax.numpy(), rtol=1e-6)
    off = np.abs(np.asarray(ours.absmax, np.int32).reshape(-1) - state.absmax.numpy().astype(np.int32))
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.005


def test_dequantised_values_are_equal_given_the_same_arrays(both):
    _, ours, packed, state = both
    double = ours.format.double
    theirs = dataclasses.replace(
        ours,
        absmax=jnp.asarray(state.absmax.numpy().reshape(ours.absmax.shape)),
        nested_absmax=jnp.asarray(state.state2.absmax.numpy()) if double else None,
        offset=jnp.asarray(state.offset.numpy()) if double else None,
    )
    expected = bnb.dequantize_4bit(packed, state).float().numpy()
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda w: w.dequantize())(theirs), np.float32), expected)


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 4096)])
def test_at_most_0_53_bytes_a_weight(shape):
    w = nf4.quantize(jnp.asarray(random_weight(shape, "bfloat16")))
    assert nf4.bytes_per_weight(w) <= 0.53
    assert {leaf.dtype.name for leaf in jax.tree.leaves(w)} == {"uint8", "float32"}


@pytest.mark.parametrize("shape", SHAPES)
def test_pack_and_unpack_are_inverse(shape):
    codes = np.random.default_rng(1).integers(0, 16, shape).astype(np.uint8)
    unpacked = layout.unpack(layout.pack(jnp.asarray(codes)), shape)
    np.testing.assert_array_equal(np.asarray(unpacked).reshape(-1)[: codes.size], codes.reshape(-1))


@pytest.mark.parametrize("shape", [(8, 256), (8, 192), (6, 50)])
@pytest.mark.parametrize("values", layout.TABLES)
def test_bitsandbytes_bytes_become_ours_and_theirs_again(shape, values):
    theirs, _ = torch_quantize(random_weight(shape, "float32"), FourBit(values))
    theirs = theirs.numpy().reshape(-1)
    ours = layout.from_bitsandbytes(jnp.asarray(theirs), shape, layout.ZERO_CODES[values])
    expected = jax.jit(FourBit(values).quantize)(jnp.asarray(random_weight(shape, "float32")))
    np.testing.assert_array_equal(ours, expected.codes)
    np.testing.assert_array_equal(layout.to_bitsandbytes(ours, shape), theirs)


def test_planar_bytes_hold_inputs_64_apart():
    codes = np.random.default_rng(2).integers(0, 16, (3, 256)).astype(np.uint8)
    packed = np.asarray(layout.pack(jnp.asarray(codes)))
    np.testing.assert_array_equal(packed[:, 70] & 15, codes[:, 128 + 6])
    np.testing.assert_array_equal(packed[:, 70] >> 4, codes[:, 128 + 64 + 6])


def test_wrong_nibble_order_would_be_noticed():
    """The negative control: the same bytes with nibbles swapped are another weight."""
    w = nf4.quantize(jnp.asarray(random_weight((128, 256), "float32")))
    swapped = nf4.NF4Array(
        w.codes >> 4 | w.codes << 4, w.absmax, w.nested_absmax, w.offset, w.out_in, w.dtype
    )
    assert not np.array_equal(swapped.dequantize(), w.dequantize())
