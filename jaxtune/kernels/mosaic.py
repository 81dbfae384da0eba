"""Pallas' Mosaic GPU backend, and what it lacks. Its names move between versions of JAX: kernels import them from here,
and only when they run, for Pallas takes a quarter of a second to import."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

__all__ = ["add_product", "computing_and_fetching", "pl", "plgpu", "product", "stream", "take", "tiled"]


def take(table: Any, index: jax.Array, layout: Any, *, interpret: Any) -> jax.Array:
    """`table[index]`, of a one-dimensional ref and an integer array in that layout."""
    if interpret:
        return table[...][index]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), layout),
        return_type=plgpu.ShapeDtypeStruct(index.shape, table.dtype, layout=layout),
    )
    def gather(_: Any, table: ir.Value, index: FragmentedArray) -> FragmentedArray:
        def entries(at: ir.Value) -> ir.Value:
            size = at.type.shape[0]
            each = [arith.index_castui(ir.IndexType.get(), vector.extract(at, [], [i])) for i in range(size)]
            return vector.from_elements(
                ir.VectorType.get((size,), table.type.element_type), [memref.load(table, [i]) for i in each]
            )

        return index._pointwise(entries)

    return gather(table, index)


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory from which tensor cores can read: rows of the last axis, swizzled as far as it allows."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling: Any = plgpu.TilingTransform
    rows: Any = plgpu.SwizzleTransform
    return plgpu.SMEM(shape, dtype, transforms=(tiling((8, swizzle * 8 // bits)), rows(swizzle)))


def add_product(total: jax.Array, a: jax.Array, b: Any, staging: Any = None) -> jax.Array:
    """`total + a @ b` on tensor cores, of arrays in registers and a ref in shared memory. The interpreter, which only
    multiplies what lies in shared memory, needs `staging` for a."""
    if staging is None:
        return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(total))
    staging[...] = a
    plgpu.commit_smem()
    return total + product(staging, b)


def product(a: Any, b: Any) -> jax.Array:
    """`a @ b` on tensor cores, of refs in shared memory, in float32."""

    def multiply(accumulator: Any) -> jax.Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))


def computing_and_fetching(
    body: Any, warpgroups: int, grid: dict[str, int], out_type: Any, scratch_types: Any, interpret: bool
) -> Any:
    """A kernel whose blocks are so many warpgroups that compute, and behind them one that fetches."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def stream(count: jax.Array, stages: int, streams: Any) -> None:
    """Fetches `count` blocks, `stages` of them ahead of whoever uses them. Of each stream: what is copied of a block,
    as (source, buffers) pairs; and the barriers that say that a buffer is full, and that it was used."""

    def refill(i: jax.Array, copies: Any, full: Any, used: Any) -> None:
        slot = lax.rem(i, stages)

        @pl.when(i >= stages)  # to the last: who waits for a barrier has to see all of it
        def _() -> None:
            plgpu.barrier_wait(used.at[slot])

        @pl.when(i < count)
        def _() -> None:
            for source, buffers in copies(i):
                plgpu.copy_gmem_to_smem(source, buffers.at[slot], full.at[slot])

    @pl.loop(0, count + stages)
    def _(i: jax.Array) -> None:
        for each in streams:
            refill(i, *each)
