"""Dequantising in one pass over device memory: packed bytes and scales in, 16-bit weights out, in the XLA reference's
bits. A program takes one group of scales, 256 blocks: 128 tiles of 64 bytes, whose two nibble planes are a block each.

The layers' stacks are read where they lie: a layer is an index, not a slice, which would be copied first.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.kernels.nf4.layout import BLOCK, DYNAMIC_MAP, GROUP, TABLES

TILES = GROUP // 2
STEP = 16
"""Tiles at a time: every lane has 8 bytes of one, so that 8 lanes write whole lines of 128 bytes."""


def why_not(shape: tuple[int, int], dtype: jnp.dtype, double: bool) -> str | None:
    """What keeps it from doing this on a machine where it runs."""
    if not double:
        return "it decodes double-quantised scales only"
    if dtype.itemsize != 2:
        return f"it gives 16 bits, not {dtype}"
    if shape[1] % (2 * BLOCK) or math.prod(shape) % (GROUP * BLOCK):
        return f"{shape} is not whole tiles of 128 in groups of 128 tiles"
    return None


def dequantize_layer(
    codes: jax.Array,
    absmax: jax.Array,
    nested_absmax: jax.Array,
    offset: jax.Array,
    index: jax.Array | int,
    *,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    values: str,
    interpret: bool = False,
) -> jax.Array:
    """The weight [N, K] of layer `index`, of stacks [layers, ...]."""
    from jaxtune.kernels.mosaic import pl, plgpu, take

    layers, groups = nested_absmax.shape
    BYTES = plgpu.Layout.TILED(plgpu.Tiling(((STEP, BLOCK), (4, 8))), (-4,), (-2, -3), -1)
    PER_TILE = BYTES.reduce(1)
    EACH = plgpu.Layout.TILED(plgpu.Tiling(((128,), (32,), (1,))), (-3,), (-2,), -1)
    by_thread = lambda shape: plgpu.Layout.WG_STRIDED(shape, vec_size=math.prod(shape) // 128)
    steps = [pl.ds(start, STEP) for start in range(0, TILES, STEP)]

    def kernel(
        index, codes, absmax, nested_absmax, offset, table, dynamic_map, out, values, products, scales
    ):
        layer, group = index[0], lax.axis_index("group")
        # On their way while the scales are decoded.
        packed = [plgpu.load(codes.at[layer, group, step], layout=BYTES, optimized=False) for step in steps]
        scale_codes = [
            plgpu.load(absmax.at[layer, group, :, plane], layout=EACH, optimized=False) for plane in (0, 1)
        ]
        values[...] = plgpu.load(table, layout=by_thread(table.shape))
        # Product and sum are two roundings, as in the reference; memory between them keeps them from being fused.
        products[...] = plgpu.load(dynamic_map, layout=by_thread((GROUP,))) * nested_absmax[layer, group]
        plgpu.commit_smem()
        for plane, code in enumerate(scale_codes):
            scales[plane] = take(products, code.astype(jnp.int32), EACH, interpret=interpret) + offset[layer]
        plgpu.commit_smem()
        for step, byte in zip(steps, packed, strict=True):
            byte = byte.astype(jnp.int32)
            for plane, code in enumerate([byte & 15, lax.shift_right_logical(byte, 4)]):
                scale = plgpu.load(scales.at[plane, step], layout=PER_TILE, optimized=False)
                value = take(values, code, BYTES, interpret=interpret)
                out[group, step, plane] = (value * lax.broadcast_in_dim(scale, code.shape, (0,))).astype(
                    dtype
                )

    table = np.tile(TABLES[values], 8)  # of one entry per lane
    weight = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((groups, TILES, 2, BLOCK), dtype),
        scratch_types=[
            plgpu.SMEM(table.shape, jnp.float32),
            plgpu.SMEM((GROUP,), jnp.float32),
            plgpu.SMEM((2, TILES), jnp.float32),
        ],
        grid=(groups,),
        grid_names=("group",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )(
        jnp.asarray(index, jnp.int32).reshape(1),
        codes.reshape(layers, groups, TILES, BLOCK),
        absmax.reshape(layers, groups, TILES, 2),
        nested_absmax,
        offset,
        table,
        DYNAMIC_MAP,
    )
    return weight.reshape(shape)
