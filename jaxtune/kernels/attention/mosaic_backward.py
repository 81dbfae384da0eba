"""The backward kernels, which compute scores again from the softmax's denominators: one takes queries and goes through
their keys, for the gradient of the queries; one takes keys and goes through the queries that see them, of all the heads
that share the keys, for the gradients of keys and values. So every sum has one order, and nothing is added in memory.

Shapes: N tokens of all rows, H heads, K key/value heads, D head size; in registers Q queries by S keys, or S by Q.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.kernels.attention.intervals import Intervals
from jaxtune.kernels.attention.mosaic_forward import QUERIES, TILE, WARPGROUPS, capped, places, unit

KEYS = 64
"""Of a warpgroup that goes through queries."""


def gradient_of_queries(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    log_sums_HN: jax.Array,
    delta_HN: jax.Array,
    seen: Intervals,
    *,
    scale: float,
    softcap: float | None,
    keys: int,
    stages: int,
    interpret: bool = False,
) -> jax.Array:
    """[N, H, D]; `delta` is each output's product with its gradient."""
    from jaxtune.kernels.mosaic import (
        begin_product,
        computing_and_fetching,
        finished,
        in_phases,
        pass_by,
        pl,
        plgpu,
        stream,
        tiled,
        with_sums,
    )

    N, H, D = q_NHD.shape
    group, dtype = H // k_NKD.shape[1], q_NHD.dtype
    PER_ROW = plgpu.Layout.WGMMA.reduce(1)
    to_log2 = unit(scale, softcap)

    def descend(
        q, k, v, dout, log_sums, delta, first, blocks, dq,
        q_buffer, dout_buffer, k_buffer, v_buffer, log_sums_buffer, delta_buffer, first_buffer,
        ready, k_ready, v_ready, k_used, v_used, staging,
    ):  # fmt: skip
        head, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = N // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, end = blocks[tile * WARPGROUPS, 0], blocks[tile * WARPGROUPS + WARPGROUPS - 1, 3]
        slot = lambda block: lax.rem(block - begin, stages)

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = tile * WARPGROUPS + wg
            edges = [blocks[mine, i] for i in range(4)]
            base = mine * QUERIES
            rows = pl.ds(base, QUERIES)
            own_q, own_dout = q_buffer.at[wg], dout_buffer.at[wg]
            for source, buffer in (
                (q.at[rows, head], q_buffer), (dout.at[rows, head], dout_buffer), (first.at[rows], first_buffer),
                (log_sums.at[head, rows], log_sums_buffer), (delta.at[head, rows], delta_buffer),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source, buffer.at[wg], ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            log_sums_Q, delta_Q, first_Q = (
                plgpu.load(buffer.at[wg], layout=PER_ROW)
                for buffer in (log_sums_buffer, delta_buffer, first_buffer)
            )

            def step(block, dq, masked):
                here = slot(block)
                of_row = lambda each: lax.broadcast_in_dim(each, (QUERIES, keys), [0])

                def body(s, dp):
                    plgpu.barrier_wait(k_ready.at[here])
                    begin_product(s, own_q, k_buffer.at[here].transpose((1, 0)))
                    plgpu.barrier_wait(v_ready.at[here])
                    begin_product(dp, own_dout, v_buffer.at[here].transpose((1, 0)))
                    s_QS, slope = capped(finished(s, under_way=1), scale, softcap)
                    p_QS = jnp.exp2(s_QS * to_log2 - of_row(log_sums_Q))
                    if masked:
                        row_Q, column_S = places(p_QS.shape, plgpu)
                        column_QS = lax.broadcast_in_dim(column_S + block * keys, p_QS.shape, [1])
                        visible = (column_QS >= of_row(first_Q)) & (column_QS <= of_row(row_Q + base))
                        p_QS = jnp.where(visible, p_QS, 0.0)
                    ds_QS = p_QS * (finished(dp) - of_row(delta_Q))
                    plgpu.barrier_arrive(v_used.at[here])
                    ds_QS = ds_QS if slope is None else ds_QS * slope
                    begin_product(
                        dq, ds_QS.astype(dtype), k_buffer.at[here], *(each.at[wg] for each in staging)
                    )
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(k_used.at[here])

                with_sums(body, (QUERIES, keys), (QUERIES, keys))

            streams = (k_ready, k_used), (v_ready, v_used)

            def through_keys(dq):
                pass_by(begin, edges[0], slot, streams)
                in_phases(functools.partial(step, dq=dq), edges)
                pass_by(edges[-1], end, slot, streams)
                return finished(dq)

            own_q[...] = (with_sums(through_keys, (QUERIES, D)) * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, dq.at[rows, head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(24, action="decrease")
            at = lambda i: (pl.ds((begin + i) * keys, keys), lax.div(head, group))
            of_keys = lambda i: [(k.at[at(i)], k_buffer)]
            of_values = lambda i: [(v.at[at(i)], v_buffer)]
            stream(end - begin, stages, [(of_keys, k_ready, k_used), (of_values, v_ready, v_used)])

    own = tiled((WARPGROUPS, QUERIES, D), dtype)
    fetched = tiled((stages, keys, D), dtype)
    number = lambda dtype: plgpu.SMEM((WARPGROUPS, QUERIES), dtype)
    kernel = computing_and_fetching(
        descend,
        WARPGROUPS,
        {"head": H, "tile": N // TILE},
        out_type=q_NHD,
        scratch_types=[
            own, own, fetched, fetched, number(jnp.float32), number(jnp.float32), number(jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=5),
            *[plgpu.Barrier(num_barriers=stages)] * 2,
            *[plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)] * 2,
            [tiled((WARPGROUPS, QUERIES, keys), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )  # fmt: skip
    return kernel(
        q_NHD, k_NKD, v_NKD, dout_NHD, log_sums_HN, delta_HN, seen.first, seen.blocks(QUERIES, keys)
    )


def gradient_of_keys(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    log_sums_HN: jax.Array,
    delta_HN: jax.Array,
    seen: Intervals,
    *,
    scale: float,
    softcap: float | None,
    queries: int,
    stages: int,
    of_keys: bool = True,
    of_values: bool = True,
    interpret: bool = False,
) -> list[jax.Array]:
    """Of keys and values, [N, K, D] each, or one of them; `queries` in a block."""
    from jaxtune.kernels.mosaic import (
        begin_product,
        computing_and_fetching,
        finished,
        in_phases,
        pass_by,
        pl,
        plgpu,
        stream,
        tiled,
        with_sums,
    )

    N, H, D = q_NHD.shape
    K, dtype = k_NKD.shape[1], q_NHD.dtype
    group, tile_size, to_log2 = H // K, WARPGROUPS * KEYS, unit(scale, softcap)
    PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
    wanted = of_keys + of_values

    def descend(q, k, v, dout, log_sums, delta, first, blocks, *rest):
        out, rest = rest[:wanted], rest[wanted:]
        (
            k_buffer, v_buffer, q_buffer, dout_buffer, log_sums_buffer, delta_buffer, first_buffer,
            ready, q_ready, dout_ready, q_used, dout_used, staging,
        ) = rest  # fmt: skip
        kv_head, wg, tile = lax.axis_index("kv_head"), lax.axis_index("warpgroup"), lax.axis_index("tile")
        begin, end = blocks[tile * WARPGROUPS, 0], blocks[tile * WARPGROUPS + WARPGROUPS - 1, 3]
        count = end - begin

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = tile * WARPGROUPS + wg
            edges = [blocks[mine, i] for i in range(4)]
            base = mine * KEYS
            rows = pl.ds(base, KEYS)
            own_k, own_v = k_buffer.at[wg], v_buffer.at[wg]
            plgpu.copy_gmem_to_smem(k.at[rows, kv_head], own_k, ready.at[wg])
            plgpu.copy_gmem_to_smem(v.at[rows, kv_head], own_v, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            of_wg = [each.at[wg] for each in staging]

            def step(block, member, totals, masked):
                slot = lax.rem(member * count + block - begin, stages)
                here = lambda buffer: plgpu.load(buffer.at[slot], layout=PER_COLUMN)
                of_column = lambda each: lax.broadcast_in_dim(each, (KEYS, queries), [1])

                def body(s, dp):
                    plgpu.barrier_wait(q_ready.at[slot])
                    begin_product(s, own_k, q_buffer.at[slot].transpose((1, 0)))
                    s_SQ, slope = capped(finished(s), scale, softcap)
                    p_SQ = jnp.exp2(s_SQ * to_log2 - of_column(here(log_sums_buffer)))
                    if masked:
                        row_S, column_Q = places(p_SQ.shape, plgpu)
                        row_SQ = lax.broadcast_in_dim(row_S + base, p_SQ.shape, [0])
                        visible = row_SQ >= of_column(here(first_buffer))
                        visible &= row_SQ <= of_column(column_Q + block * queries)
                        p_SQ = jnp.where(visible, p_SQ, 0.0)
                    weights = lax.optimization_barrier(p_SQ.astype(dtype))
                    plgpu.barrier_wait(dout_ready.at[slot])
                    if of_keys:
                        begin_product(dp, own_v, dout_buffer.at[slot].transpose((1, 0)))
                    if of_values:
                        begin_product(totals[-1], weights, dout_buffer.at[slot], *of_wg)
                    if of_keys:
                        ds_SQ = p_SQ * (
                            finished(dp, under_way=int(of_values)) - of_column(here(delta_buffer))
                        )
                        ds_SQ = ds_SQ if slope is None else ds_SQ * slope
                    if of_values:
                        dv_SD = finished(totals[-1])
                    if (
                        of_values and of_keys
                    ):  # registers that products read are written while none is under way
                        _, ds_SQ = lax.optimization_barrier((dv_SD, ds_SQ))
                    plgpu.barrier_arrive(dout_used.at[slot])
                    if of_keys:
                        begin_product(totals[0], ds_SQ.astype(dtype), q_buffer.at[slot], *of_wg)
                        plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_used.at[slot])

                with_sums(body, (KEYS, queries), (KEYS, queries))

            def through_heads(*totals):
                @pl.loop(0, group)
                def _(member):
                    slot = lambda block: lax.rem(member * count + block - begin, stages)
                    streams = (q_ready, q_used), (dout_ready, dout_used)
                    pass_by(begin, edges[0], slot, streams)
                    in_phases(functools.partial(step, member=member, totals=totals), edges)
                    pass_by(edges[-1], end, slot, streams)

                return [finished(each) for each in totals]

            gradients = with_sums(through_heads, *[(KEYS, D)] * wanted)
            places_and_factors = [(own_k, scale)] * of_keys + [(own_v, 1.0)] * of_values
            for gradient, (own_buffer, factor), target in zip(
                gradients, places_and_factors, out, strict=True
            ):
                own_buffer[...] = (gradient * factor).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_buffer, target.at[rows, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(24, action="decrease")

            def of_queries(i):
                head, rows = head_and_rows(i)
                yield q.at[rows, head], q_buffer
                yield log_sums.at[head, rows], log_sums_buffer
                yield first.at[rows], first_buffer

            def of_gradients(i):
                head, rows = head_and_rows(i)
                yield dout.at[rows, head], dout_buffer
                yield delta.at[head, rows], delta_buffer

            def head_and_rows(i):
                return kv_head * group + lax.div(i, count), pl.ds(
                    (begin + lax.rem(i, count)) * queries, queries
                )

            stream(
                group * count, stages, [(of_queries, q_ready, q_used), (of_gradients, dout_ready, dout_used)]
            )

    own = tiled((WARPGROUPS, KEYS, D), dtype)
    fetched = tiled((stages, queries, D), dtype)
    number = lambda dtype: plgpu.SMEM((stages, queries), dtype)
    kernel = computing_and_fetching(
        descend,
        WARPGROUPS,
        {"kv_head": K, "tile": N // tile_size},
        out_type=[k_NKD] * wanted,
        scratch_types=[
            own, own, fetched, fetched, number(jnp.float32), number(jnp.float32), number(jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages, num_arrivals=3),
            plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            *[plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS)] * 2,
            [tiled((WARPGROUPS, KEYS, queries), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )  # fmt: skip
    return kernel(
        q_NHD, k_NKD, v_NKD, dout_NHD, log_sums_HN, delta_HN, seen.first, seen.blocks_by(KEYS, queries)
    )
