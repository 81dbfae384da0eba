"""Dequantising in one pass over device memory: packed bytes and scales in, 16-bit weights out, in the XLA reference's
bits. A program takes one group of scales, 256 blocks: 128 tiles of 64 bytes, whose two nibble planes are a block each.

It can read a layer of stacks where it lies, by its index. Weights are given as stacks of one all the same: of a slice,
XLA makes a copy that took 1.3 us more at 14336 x 4096.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxtune.kernels.nf4.layout import BLOCK, DYNAMIC_MAP, GROUP, TABLES

TILES = GROUP // 2


def why_not(shape: tuple[int, int], dtype: jnp.dtype, double: bool) -> str | None:
    """What keeps it from doing this on a machine where it runs."""
    if not double:
        return "it decodes double-quantised scales only"
    if dtype.itemsize != 2:
        return f"it gives 16 bits, not {dtype}"
    if shape[1] % (2 * BLOCK) or math.prod(shape) % (GROUP * BLOCK):
        return f"{shape} is not whole tiles of 128 in groups of 128 tiles"
    return None


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "values", "interpret"))
def dequantize_layer(
    stack: tuple[Any, ...],
    index: jax.Array | int,
    *,
    shape: tuple[int, int],
    dtype: jnp.dtype,
    values: str,
    interpret: bool = False,
) -> jax.Array:
    """The weight [N, K] of layer `index`, of the four packed arrays as stacks [layers, ...]. Compiled by itself: a step
    calls it hundreds of times, and lowers it once for each shape."""
    from jaxtune.kernels.mosaic import plgpu, take, unnumbered

    codes, absmax, nested_absmax, offset = stack
    layers, groups = nested_absmax.shape
    # Every lane has 8 bytes of a tile in each of 8 turns, so that 8 lanes write whole lines of 128 bytes.
    BYTES = plgpu.Layout.TILED(plgpu.Tiling(((16, BLOCK), (4, 8))), (-4,), (-2, -3), -1)
    PER_TILE = BYTES.reduce(1)
    PER_LANE = plgpu.Layout.TILED(plgpu.Tiling(((128,), (32,), (1,))), (-3,), (-2,), -1)
    PAIR_PER_LANE = plgpu.Layout.WG_STRIDED((GROUP,), vec_size=2)

    def nf4_dequantize(
        index, codes, absmax, nested_absmax, offset, table, dynamic_map, out, values, products, scales
    ):
        layer, group = index[0], lax.axis_index("group")
        load = functools.partial(plgpu.load, optimized=False)
        packed = load(codes.at[layer, group], layout=BYTES)  # arrives meanwhile
        scale_codes = [load(absmax.at[layer, group, :, plane], layout=PER_LANE) for plane in (0, 1)]
        values[...] = load(table, layout=PER_LANE)
        # Product and sum are two roundings, as in the reference: memory between them keeps them from being fused.
        products[...] = load(dynamic_map, layout=PAIR_PER_LANE) * nested_absmax[layer, group]
        plgpu.commit_smem()
        for plane, code in enumerate(scale_codes):
            product = take(products, code.astype(jnp.int32), PER_LANE, interpret=interpret)
            scales[plane] = product + offset[layer]
        plgpu.commit_smem()
        byte = packed.astype(jnp.int32)
        for plane, code in enumerate([byte & 15, lax.shift_right_logical(byte, 4)]):
            value = take(values, code, BYTES, interpret=interpret)
            scale = lax.broadcast_in_dim(load(scales.at[plane], layout=PER_TILE), value.shape, (0,))
            out[group, :, plane] = (value * scale).astype(dtype)

    table = np.tile(TABLES[values], 8)  # every lane brings one entry
    weight = plgpu.kernel(
        unnumbered(nf4_dequantize, interpret=interpret),
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
