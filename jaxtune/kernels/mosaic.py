"""Pallas' Mosaic GPU backend, and what it lacks. Its names move between versions of JAX: kernels have them from here,
and are imported only when they run, for Pallas takes a quarter of a second to import."""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.pallas.mosaic_gpu.primitives import wgmma_accumulator_store
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, memref, vector

__all__ = [
    "Stream", "add_in_turn", "barriers", "begin_product", "computing_and_fetching", "fetch", "finished", "in_phases",
    "in_roles", "pass_by", "pl", "plgpu", "take", "tiled", "turns", "unnumbered", "with_sums", "zeros",
]  # fmt: skip


def unnumbered(body: Any, *, interpret: bool) -> Any:
    """JAX numbers kernels as a process lowers them, in a name for dumps that the compilation cache's key covers: a run
    would find only what one with the same history has kept. A name that is there already, JAX leaves."""
    if interpret:
        return body

    @plgpu.inline_mgpu()
    def name(_: Any) -> None:
        operation: Any = ir.InsertionPoint.current.block.owner
        while operation.name != "builtin.module":
            operation = operation.parent
        operation.attributes["mosaic_gpu.dump_basename"] = operation.attributes["sym_name"]

    @functools.wraps(body)
    def named(*refs: Any) -> Any:
        name()
        return body(*refs)

    return named


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


def with_sums(body: Any, *starts: Any, interpret: bool = False) -> Any:
    """`body(*sums)`: registers in which tensor cores add up products in float32, each of a shape, from zero, or from
    the array that it begins at."""
    sums = [None if isinstance(start, tuple) or not interpret else _InterpretedSum(start) for start in starts]
    fresh = [i for i, each in enumerate(sums) if each is None]
    shapes = [start if isinstance(start, tuple) else start.shape for start in starts]

    def run(*accumulators: Any) -> Any:
        for i, accumulator in zip(fresh, accumulators, strict=True):
            sums[i] = accumulator
            if not isinstance(starts[i], tuple):
                wgmma_accumulator_store(accumulator, starts[i])
        return body(*sums)

    return pl.run_scoped(run, *[plgpu.ACC(shapes[i], jnp.float32) for i in fresh]) if fresh else run()


def begin_product(total: Any, a: Any, b: Any, staging: Any = None) -> None:
    """`total += a @ b`, which then is under way: b lies in shared memory, and a there or in registers. The interpreter
    needs `staging` for the latter."""
    if staging is not None:
        staging[...] = a
        plgpu.commit_smem()
        a = staging
    if isinstance(total, _InterpretedSum):
        total.value += with_sums(functools.partial(_product, a, b), total.value.shape)
    else:
        plgpu.wgmma(total, a, b)


def finished(total: Any, under_way: int = 0) -> jax.Array:
    """What a sum is once no more than the last so many products are under way, of which none is its own."""
    if isinstance(total, _InterpretedSum):
        return total.value
    return plgpu.wgmma_accumulator_load(total, wait_n=under_way)


def _product(a: Any, b: Any, total: Any) -> jax.Array:
    plgpu.wgmma(total, a, b)
    return total[...]


@dataclasses.dataclass
class _InterpretedSum:
    """The interpreter has sums from zero only."""

    value: jax.Array


def zeros(*shape: int) -> jax.Array:
    """A matrix in the registers of a warpgroup, as tensor cores have it."""
    return plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)


def computing_and_fetching(
    body: Any,
    warpgroups: int,
    grid: dict[str, int],
    out_type: Any,
    scratch_types: Any,
    interpret: bool,
    roles: int = 1,
) -> Any:
    """A kernel whose blocks are so many warpgroups that compute, and behind them one that fetches, or has so many
    `in_roles`."""
    return plgpu.kernel(
        unnumbered(body, interpret=interpret),
        out_type=out_type,
        scratch_types=scratch_types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=warpgroups + (roles if interpret else 1),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )


def in_roles(roles: list[Any], warpgroup: Any, *, interpret: bool) -> None:
    """Each in a warp of the warpgroup behind those that compute. The interpreter, which runs out of threads when warps
    are some too, has warpgroups for them, of which this is the n-th."""

    def run(number: Any) -> None:
        for i, role in enumerate(roles):
            pl.when(number == i)(role)

    if interpret:
        run(warpgroup)
    else:
        plgpu.warp_map(run)


def in_phases(step: Any, edges: Any, carry: Any = None) -> Any:
    """`carry = step(i, carry, masked=)`, i from the first of four edges to the last, not masked between those in the
    middle; without a carry, `step(i, masked=)`."""
    begin, whole, part, end = edges
    for start, stop, masked in ((begin, whole, True), (whole, part, False), (part, end, True)):
        each = functools.partial(step, masked=masked)
        if carry is None:
            pl.loop(start, stop)(each)
        else:
            carry = lax.fori_loop(start, stop, each, carry)
    return carry


class Stream(NamedTuple):
    """Blocks that one warpgroup fetches and the others use, `stages` of them on their way or in use."""

    stages: int
    barriers: list[Any]
    """One for each stage that says that a block is there, and one that everyone is done with it."""

    def slot(self, i: Any) -> Any:
        return lax.rem(i, self.stages)

    def wait(self, i: Any) -> Any:
        """For block i; where it lies."""
        plgpu.barrier_wait(self.barriers[0].at[self.slot(i)])
        return self.slot(i)

    def release(self, i: Any) -> None:
        plgpu.barrier_arrive(self.barriers[1].at[self.slot(i)])


def barriers(stages: int, copies: int, users: int) -> list[Any]:
    """Scratch of a stream: of blocks that so many copies bring, for so many warpgroups."""
    return [
        plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        plgpu.Barrier(num_barriers=stages, num_arrivals=users),
    ]


def pass_by(begin: Any, end: Any, streams: list[Stream]) -> None:
    """Lets go of blocks that others of the program use, and this warpgroup does not."""

    @pl.loop(begin, end)
    def _(i: jax.Array) -> None:
        for each in streams:
            each.wait(i)
            each.release(i)


def fetch(count: Any, streams: list[tuple[Stream, Any]]) -> None:
    """Fetches `count` blocks of each stream, ahead of whoever uses them: `copies(i)` are (source, buffers) pairs."""

    def refill(i: Any, of: Stream, copies: Any) -> None:
        full, used = of.barriers

        @pl.when((i >= of.stages) & (i < count + of.stages))  # who waits for a barrier has to see all of it
        def _() -> None:
            plgpu.barrier_wait(used.at[of.slot(i)])

        @pl.when(i < count)
        def _() -> None:
            for source, buffers in copies(i):
                plgpu.copy_gmem_to_smem(source, buffers.at[of.slot(i)], full.at[of.slot(i)])

    @pl.loop(0, count + max(of.stages for of, _ in streams))
    def _(i: jax.Array) -> None:
        for each in streams:
            refill(i, *each)


def turns(*shape: int, interpret: bool) -> Any:
    """Counters that all programs of a kernel share, from zero. (Under `vmap`, all of its calls would.)"""
    return None if interpret else pl.get_global(plgpu.SemaphoreType.REGULAR(shape))


def add_in_turn(pairs: list[Any], turns: Any, which: Any, before: Any, *, interpret: bool) -> None:
    """Adds buffers to memory, in (buffer, memory) pairs, once so many programs have `before` this one, whose turns that
    counter counts; the first writes. The interpreter has one program after the other, and no sums in memory."""
    add = functools.partial(_add, pairs, interpret=interpret)
    if turns is not None:
        plgpu.semaphore_wait(turns.at[which], before, decrement=False, memory_scope="gpu")
    pl.when(before == 0)(functools.partial(add, None))
    pl.when(before > 0)(functools.partial(add, "add"))
    if turns is not None:
        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(turns.at[which], memory_scope="gpu")


def _add(pairs: list[Any], operation: Literal["add"] | None, interpret: bool) -> None:
    for buffer, memory in pairs:
        if interpret:
            memory[...] = buffer[...] + (0 if operation is None else memory[...])
        else:
            plgpu.copy_smem_to_gmem(buffer, memory, reduction_op=operation)
