"""The forward kernel. A program takes TILE queries of one head, half of them by each of two warpgroups, while a third
fetches keys and values, a block ahead. Scores stay in registers; the softmax is taken as they come.

Shapes: N tokens of all rows, H heads, K key/value heads, D head size; Q queries of a warpgroup, S keys of a block.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.kernels.attention.tiles import QUERIES, TILE, WARPGROUPS
from jaxtune.kernels.mosaic import (
    Stream,
    barriers,
    begin_product,
    computing_and_fetching,
    fetch,
    finished,
    pass_by,
    pl,
    plgpu,
    tiled,
    with_sums,
    zeros,
)

LOG2_E = math.log2(math.e)
NEVER, LEAST = -1e30, -1e20
"""A score that cannot be seen, and what the greatest of a row's is taken for at least: both finite, and far apart, so
that rows without any key have weights of zero, and no NaN."""


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "keys", "stages", "interpret"))
def forward(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    first_N: jax.Array,
    edges: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    keys: int,
    stages: tuple[int, int],
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output [N, H, D], and the logarithm to base 2 of each softmax's denominator [H, N], in float32. `first`, and the
    `edges` of each warpgroup's blocks, are as in `intervals`. A block has so many `keys`; `stages` of them, and of the
    values', are on their way or in use. The scale is positive. (Compiled by itself, so that all layers share it.)"""
    N, H, D = q_NHD.shape
    group = H // k_NKD.shape[1]
    dtype = q_NHD.dtype
    PER_ROW = plgpu.Layout.WGMMA.reduce(1)
    to_log2 = unit(scale, softcap)

    def attend(
        q, k, v, first, blocks, out, log_sums, q_buffer, k_buffer, v_buffer, log_sums_buffer, first_buffer,
        q_ready, of_keys, of_values, staging,
    ):  # fmt: skip
        head, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = N // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, end = blocks[tile * WARPGROUPS, 0], blocks[tile * WARPGROUPS + WARPGROUPS - 1, 3]
        keys_in, values_in = streams = [*map(Stream, stages, (of_keys, of_values))]

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = tile * WARPGROUPS + wg
            edges = [blocks[mine, i] - begin for i in range(4)]
            my_begin, my_end = edges[0], edges[-1]
            base = mine * QUERIES
            rows = pl.ds(base, QUERIES)
            own_q, own_log_sums, own_first = q_buffer.at[wg], log_sums_buffer.at[wg], first_buffer.at[wg]
            plgpu.copy_gmem_to_smem(q.at[rows, head], own_q, q_ready.at[wg])
            plgpu.copy_gmem_to_smem(first.at[rows], own_first, q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            first_Q = plgpu.load(own_first, layout=PER_ROW)

            def scores(block, s_QS):
                s_QS, _ = capped(s_QS, scale, softcap)

                def mask(s_QS):
                    row_Q, column_S = places(s_QS.shape)
                    of_row = lambda each: lax.broadcast_in_dim(each, s_QS.shape, [0])
                    column_QS = lax.broadcast_in_dim(column_S + (begin + block) * keys, s_QS.shape, [1])
                    visible = (column_QS >= of_row(first_Q)) & (column_QS <= of_row(row_Q + base))
                    return jnp.where(visible, s_QS, NEVER)

                return where_partly_seen(mask, s_QS, block, edges)

            def weights(s_QS, most_Q, sum_Q):
                now_Q = jnp.maximum(most_Q, s_QS.max(axis=1) * to_log2)
                shrink_Q = jnp.exp2(most_Q - now_Q)
                p_QS = jnp.exp2(s_QS * to_log2 - lax.broadcast_in_dim(now_Q, s_QS.shape, [0]))
                sum_Q = sum_Q * shrink_Q + p_QS.sum(axis=1)
                return p_QS, now_Q, sum_Q, shrink_Q

            of_wg = [each.at[wg] for each in staging]

            def step(block, carry):
                """The products with the last block's values go on while this block's weights are found."""
                out_QD, p_QS, most_Q, sum_Q = carry

                def body(s, out):
                    begin_product(s, own_q, k_buffer.at[keys_in.wait(block)].transpose((1, 0)))
                    begin_product(out, p_QS, v_buffer.at[values_in.wait(block - 1)], *of_wg)
                    s_QS = scores(block, finished(s, under_way=1))
                    keys_in.release(block)
                    p, now_Q, total_Q, shrink_Q = weights(s_QS, most_Q, sum_Q)
                    # Registers that products read must not be written while others are under way.
                    out_QD, p = lax.optimization_barrier((finished(out), p))
                    values_in.release(block - 1)
                    out_QD *= lax.broadcast_in_dim(shrink_Q, out_QD.shape, [0])
                    return out_QD, p.astype(dtype), now_Q, total_Q

                return with_sums(body, (QUERIES, keys), out_QD, interpret=interpret)

            def first_block():
                def body(s):
                    begin_product(s, own_q, k_buffer.at[keys_in.wait(my_begin)].transpose((1, 0)))
                    return scores(my_begin, finished(s))

                s_QS = with_sums(body, (QUERIES, keys))
                keys_in.release(my_begin)
                none = lambda value: plgpu.layout_cast(jnp.full((QUERIES,), value, jnp.float32), PER_ROW)
                p, now_Q, total_Q, _ = weights(s_QS, none(LEAST), none(0.0))
                return zeros(QUERIES, D), p.astype(dtype), now_Q, total_Q

            pass_by(0, my_begin, streams)
            out_QD, p_QS, most_Q, sum_Q = lax.fori_loop(my_begin + 1, my_end, step, first_block())

            def body(out):
                begin_product(out, p_QS, v_buffer.at[values_in.wait(my_end - 1)], *of_wg)
                return finished(out)

            out_QD = with_sums(body, out_QD, interpret=interpret)
            values_in.release(my_end - 1)
            pass_by(my_end, end - begin, streams)
            sum_Q = jnp.maximum(sum_Q, 1e-30)
            own_q[...] = (out_QD * lax.broadcast_in_dim(1 / sum_Q, out_QD.shape, [0])).astype(dtype)
            own_log_sums[...] = most_Q + jnp.log2(sum_Q)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, out.at[rows, head])
            plgpu.copy_smem_to_gmem(own_log_sums, log_sums.at[head, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(24, action="decrease")
            at = lambda i: (pl.ds((begin + i) * keys, keys), lax.div(head, group))
            fetch(
                end - begin,
                [
                    (keys_in, lambda i: [(k.at[at(i)], k_buffer)]),
                    (values_in, lambda i: [(v.at[at(i)], v_buffer)]),
                ],
            )

    kernel = computing_and_fetching(
        attend,
        WARPGROUPS,
        {"head": H, "tile": N // TILE},
        out_type=(q_NHD, jax.ShapeDtypeStruct((H, N), jnp.float32)),
        scratch_types=[
            tiled((WARPGROUPS, QUERIES, D), dtype),
            *[tiled((depth, keys, D), dtype) for depth in stages],
            plgpu.SMEM((WARPGROUPS, QUERIES), jnp.float32),
            plgpu.SMEM((WARPGROUPS, QUERIES), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            *[barriers(depth, 1, WARPGROUPS) for depth in stages],
            [tiled((WARPGROUPS, QUERIES, keys), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )
    return kernel(q_NHD, k_NKD, v_NKD, first_N, edges)


def unit(scale: float, softcap: float | None) -> float:
    """Times `capped` products, it gives scores as exponents of 2."""
    return LOG2_E * (scale if softcap is None else softcap)


def capped(products: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Of queries' products with keys, what is left with a softcap, and of their gradient."""
    if softcap is None:
        return products, None
    within = jnp.tanh(products * (scale / softcap))
    return within, 1 - within * within


def where_partly_seen(mask: Any, values: jax.Array, block: Any, edges: Any) -> jax.Array:
    """`mask(values)` in a block of which not all is seen: before the second of four `edges`, or from the third on."""
    _, whole, part, _ = edges
    return lax.cond((block < whole) | (block >= part), mask, lambda values: values, values)


def places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """The numbers of the rows, and of the columns, of a matrix in registers."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=plgpu.Layout.WGMMA.reduce(1 - axis))
        for axis, size in enumerate(shape)
    )
    return row, column
