"""Pallas' Mosaic GPU backend, and what it lacks. Its names move between versions of JAX: kernels import them from here,
and only when they run, for Pallas takes a quarter of a second to import."""

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

__all__ = ["pl", "plgpu", "take"]


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
