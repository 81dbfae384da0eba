"""The backward kernel that finds all gradients at once, with five products for a block of queries and one of keys where
those of `mosaic_backward` need seven. A program takes TILE keys, half of them by each of two warpgroups, and goes down
through the queries that see them, of all the heads that share the keys. The gradients of its keys and values stay in
registers; those of the queries are sums over programs, in float32 and in memory. Programs add to them in the order of
their keys, so that two runs give the same bits. They wait for none that was started after them.

Shapes: N tokens of all rows, H heads, K key/value heads, D head size; in registers S keys by Q queries.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.kernels.attention.mosaic_forward import capped, places, unit, where_partly_seen
from jaxtune.kernels.attention.tiles import KEYS, QUERIES, TILE, WARPGROUPS
from jaxtune.kernels.mosaic import (
    Stream,
    add_in_turn,
    barriers,
    begin_product,
    computing_and_fetching,
    fetch,
    finished,
    in_roles,
    pl,
    plgpu,
    tiled,
    turns,
    with_sums,
)

STAGES = 2
"""Of blocks on their way in, of scores' gradients between the warpgroups, and of sums on their way out."""
TOGETHER = 8
"""Rows' heads of keys and values at a time: with fewer, more programs wait for each other; with more, a program finds
less in caches of what others have read and added."""


@functools.partial(jax.jit, static_argnames=("rows", "scale", "softcap", "interpret"))
def gradients(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    log_sums_HN: jax.Array,
    delta_HN: jax.Array,
    first_N: jax.Array,
    first_tiles: jax.Array,
    edges: jax.Array,
    *,
    rows: int,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of queries [N, H, D], keys and values [N, K, D]; `delta` is each output's product with its gradient. A block of
    queries sees tiles of keys from the one in `first_tiles` on; `edges` are those of the tiles' blocks of queries."""
    N, H, D = q_NHD.shape
    K, dtype = k_NKD.shape[1], q_NHD.dtype
    group, tiles, part_of_head, to_log2 = H // K, N // rows // TILE, D // WARPGROUPS, unit(scale, softcap)
    together = math.gcd(K, max(1, TOGETHER // rows))
    PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)

    def descend(
        q, k, v, dout, log_sums, delta, first, first_tiles, edges, dq, dk, dv,
        k_buffer, v_buffer, q_buffer, dout_buffer, ds_buffer, dq_buffer, numbers, first_buffer,
        ready, of_queries, of_gradients, of_sums, exchanged, staging,
    ):  # fmt: skip
        kv_head = lax.axis_index("kv_heads") * together + lax.axis_index("kv_head")
        tile, wg = lax.axis_index("row") * tiles + lax.axis_index("tile"), lax.axis_index("warpgroup")
        own_edges = [edges[tile, i] for i in range(4)]
        begin, end = own_edges[0], own_edges[-1]
        count = (end - begin) * group
        log_sums_buffer, delta_buffer = numbers.at[:STAGES], numbers.at[STAGES:]
        queries_in, gradients_in, sums_out = (
            Stream(STAGES, each) for each in (of_queries, of_gradients, of_sums)
        )
        turn = turns(H, N // QUERIES, interpret=interpret)

        def head_and_block(i):
            """The last queries first, of all heads: so do all programs, each soon after the one that it waits for."""
            return kv_head * group + lax.rem(i, group), end - 1 - lax.div(i, group)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            base = tile * TILE + wg * KEYS
            rows = pl.ds(base, KEYS)
            own_k, own_v = k_buffer.at[wg], v_buffer.at[wg]
            plgpu.copy_gmem_to_smem(k.at[rows, kv_head], own_k, ready.at[wg])
            plgpu.copy_gmem_to_smem(v.at[rows, kv_head], own_v, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            of_wg = [each.at[wg] for each in staging]

            def weights_and_gradients(s, dp, i, me):
                """Of the scores of block i, in 16 bits."""
                here, there = queries_in.wait(i), gradients_in.slot(i)
                of_column = lambda each: lax.broadcast_in_dim(each, (KEYS, QUERIES), [1])
                number = lambda buffer: of_column(plgpu.load(buffer, layout=PER_COLUMN))
                block = head_and_block(i)[1]

                def mask(p_SQ):
                    row_S, column_Q = places(p_SQ.shape)
                    row_SQ = lax.broadcast_in_dim(row_S + base, p_SQ.shape, [0])
                    visible = row_SQ >= number(first_buffer.at[here])
                    visible &= row_SQ <= of_column(column_Q + block * QUERIES)
                    return jnp.where(visible, p_SQ, 0.0)

                begin_product(s, k_buffer.at[me], q_buffer.at[here].transpose((1, 0)))
                gradients_in.wait(i)
                begin_product(dp, v_buffer.at[me], dout_buffer.at[there].transpose((1, 0)))
                s_SQ, slope = capped(finished(s, under_way=1), scale, softcap)
                p_SQ = jnp.exp2(s_SQ * to_log2 - number(log_sums_buffer.at[here]))
                dp_SQ = finished(dp)
                p_SQ = where_partly_seen(mask, p_SQ, block, own_edges)
                ds_SQ = p_SQ if slope is None else p_SQ * slope
                ds_SQ *= dp_SQ - number(delta_buffer.at[there])
                # Registers that products read are written while none is under way.
                return lax.optimization_barrier((p_SQ.astype(dtype), ds_SQ.astype(dtype)))

            def begin_of_queries(total, i, me):
                """Half the columns of block i's sum over both warpgroups' keys."""
                plgpu.barrier_wait(exchanged)
                columns = pl.ds(me * part_of_head, part_of_head)
                for other in range(WARPGROUPS):
                    ds = ds_buffer.at[lax.rem(i, STAGES), other].transpose((1, 0))
                    begin_product(total, ds, k_buffer.at[other, :, columns])

            def pass_on(dq_QD, i, me):
                out = sums_out.slot(i)
                plgpu.barrier_wait(of_sums[1].at[out])
                dq_buffer[out, me] = dq_QD
                plgpu.commit_smem()
                plgpu.barrier_arrive(of_sums[0].at[out])

            def step(i, of_k, of_v, is_first=False):
                """The queries' sum is that of the block before, of which the other warpgroup is done by now."""
                me = lax.optimization_barrier(wg)  # or addresses would be kept, in registers that are needed
                p_SQ, ds_SQ = with_sums(
                    functools.partial(weights_and_gradients, i=i, me=me), *[(KEYS, QUERIES)] * 2
                )

                def begin_of_keys_and_values():
                    begin_product(of_v, p_SQ, dout_buffer.at[gradients_in.slot(i)], *of_wg)
                    begin_product(of_k, ds_SQ, q_buffer.at[queries_in.slot(i)], *of_wg)
                    ds_buffer[lax.rem(i, STAGES), me] = ds_SQ

                def last_queries(total):
                    begin_of_queries(total, i - 1, me)
                    begin_of_keys_and_values()
                    return finished(total, under_way=2)

                if is_first:
                    begin_of_keys_and_values()
                    plgpu.commit_smem()
                else:
                    pass_on(with_sums(last_queries, (QUERIES, part_of_head)), i - 1, me)
                plgpu.barrier_arrive(exchanged)
                plgpu.wgmma_wait(0)
                gradients_in.release(i)
                queries_in.release(i)

            def through_queries(of_k, of_v):
                step(0, of_k, of_v, is_first=True)

                @pl.loop(1, count)
                def _(i):
                    step(i, of_k, of_v)

                def last_queries(total):
                    begin_of_queries(total, count - 1, wg)
                    return finished(total)

                pass_on(with_sums(last_queries, (QUERIES, part_of_head)), count - 1, wg)
                return finished(of_k), finished(of_v)

            dk_SD, dv_SD = with_sums(through_queries, (KEYS, D), (KEYS, D))
            plgpu.barrier_arrive(exchanged)
            plgpu.barrier_wait(exchanged)  # until the other warpgroup has read our keys
            for gradient, own, target in ((dk_SD * scale, own_k, dk), (dv_SD, own_v, dv)):
                own[...] = gradient.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own, target.at[rows, kv_head])

            @pl.loop(count, count + STAGES)
            def _(i):
                plgpu.barrier_wait(of_sums[1].at[sums_out.slot(i)])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def fetch_queries():
            def queries_and_numbers(i):
                head, rows = head_and_rows(i)
                yield q.at[rows, head], q_buffer
                yield log_sums.at[head, rows], log_sums_buffer
                yield first.at[rows], first_buffer

            def gradients_and_numbers(i):
                head, rows = head_and_rows(i)
                yield dout.at[rows, head], dout_buffer
                yield delta.at[head, rows], delta_buffer

            def head_and_rows(i):
                head, block = head_and_block(i)
                return head, pl.ds(block * QUERIES, QUERIES)

            fetch(count, [(queries_in, queries_and_numbers), (gradients_in, gradients_and_numbers)])

        def add_queries(out):
            """Of one of the stages."""
            plgpu.barrier_arrive(of_sums[1].at[out])

            @pl.loop(0, lax.div(count - out + STAGES - 1, STAGES))
            def _(i):
                head, block = head_and_block(i * STAGES + out)
                plgpu.barrier_wait(of_sums[0].at[out])
                target = dq.at[pl.ds(block * QUERIES, QUERIES), head]
                halves = [
                    (dq_buffer.at[out, half], target.at[:, pl.ds(half * part_of_head, part_of_head)])
                    for half in range(WARPGROUPS)
                ]
                add_in_turn(halves, turn, (head, block), tile - first_tiles[block], interpret=interpret)
                plgpu.barrier_arrive(of_sums[1].at[out])

        @pl.when(wg >= WARPGROUPS)
        def _fetch_and_add():
            plgpu.set_max_registers(24, action="decrease")
            adding = [functools.partial(add_queries, out) for out in range(STAGES)]
            in_roles([fetch_queries, *adding], wg - WARPGROUPS, interpret=interpret)

    own, blocks = tiled((WARPGROUPS, KEYS, D), dtype), tiled((STAGES, QUERIES, D), dtype)
    kernel = computing_and_fetching(
        descend,
        WARPGROUPS,
        {"kv_heads": K // together, "tile": tiles, "row": rows, "kv_head": together},
        out_type=[jax.ShapeDtypeStruct(q_NHD.shape, jnp.float32), k_NKD, v_NKD],
        scratch_types=[
            own, own, blocks, blocks, tiled((STAGES, WARPGROUPS, KEYS, QUERIES), dtype),
            tiled((STAGES, WARPGROUPS, QUERIES, part_of_head), jnp.float32),
            plgpu.SMEM((2 * STAGES, QUERIES), jnp.float32), plgpu.SMEM((STAGES, QUERIES), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            barriers(STAGES, 3, WARPGROUPS), barriers(STAGES, 2, WARPGROUPS), barriers(STAGES, WARPGROUPS, 1),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            [tiled((WARPGROUPS, KEYS, QUERIES), dtype)] if interpret else [],
        ],
        interpret=interpret,
        roles=1 + STAGES,
    )  # fmt: skip
    one_by_one = jax.custom_batching.sequential_vmap(kernel)  # for `turns` are one call's
    dq, dk, dv = one_by_one(q_NHD, k_NKD, v_NKD, dout_NHD, log_sums_HN, delta_HN, first_N, first_tiles, edges)
    return (dq * scale).astype(dtype), dk, dv
