"""The backward kernels, which compute scores again from the softmax's denominators: one takes queries and goes through
their keys, for the gradient of the queries; one takes keys and goes through the queries that see them, of all the heads
that share the keys, for the gradients of keys and values. So every sum has one order, and nothing is added in memory.

Shapes: N tokens of all rows, H heads, K key/value heads, D head size; in registers Q queries by S keys, or S by Q.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxtune.kernels.attention.mosaic_forward import capped, places, unit
from jaxtune.kernels.attention.tiles import KEYS, QUERIES, TILE, WARPGROUPS
from jaxtune.kernels.mosaic import (
    Stream,
    barriers,
    begin_product,
    computing_and_fetching,
    fetch,
    finished,
    in_phases,
    pass_by,
    pl,
    plgpu,
    tiled,
    with_sums,
)


@functools.partial(jax.jit, static_argnames=("scale", "softcap", "keys", "stages", "interpret"))
def gradient_of_queries(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    log_sums_HN: jax.Array,
    delta_HN: jax.Array,
    first_N: jax.Array,
    edges: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    keys: int,
    stages: tuple[int, int],
    interpret: bool = False,
) -> jax.Array:
    """[N, H, D]; `delta` is each output's product with its gradient."""
    N, H, D = q_NHD.shape
    group, dtype = H // k_NKD.shape[1], q_NHD.dtype
    PER_ROW = plgpu.Layout.WGMMA.reduce(1)
    to_log2 = unit(scale, softcap)

    def descend(
        q, k, v, dout, log_sums, delta, first, blocks, dq,
        q_buffer, dout_buffer, k_buffer, v_buffer, numbers, first_buffer,
        ready, of_keys, of_values, staging,
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
            base = mine * QUERIES
            rows = pl.ds(base, QUERIES)
            own_q, own_dout = q_buffer.at[wg], dout_buffer.at[wg]
            for source, buffer in (
                (q.at[rows, head], q_buffer), (dout.at[rows, head], dout_buffer), (first.at[rows], first_buffer),
                (log_sums.at[head, rows], numbers.at[0]), (delta.at[head, rows], numbers.at[1]),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source, buffer.at[wg], ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            log_sums_Q, delta_Q, first_Q = (
                plgpu.load(buffer.at[wg], layout=PER_ROW)
                for buffer in (numbers.at[0], numbers.at[1], first_buffer)
            )

            def step(block, total, masked):
                of_row = lambda each: lax.broadcast_in_dim(each, (QUERIES, keys), [0])

                def body(s, dp):
                    block_k, block_v = k_buffer.at[keys_in.wait(block)], v_buffer.at[values_in.wait(block)]
                    begin_product(s, own_q, block_k.transpose((1, 0)))
                    begin_product(dp, own_dout, block_v.transpose((1, 0)))
                    s_QS, slope = capped(finished(s, under_way=1), scale, softcap)
                    p_QS = jnp.exp2(s_QS * to_log2 - of_row(log_sums_Q))
                    if masked:
                        row_Q, column_S = places(p_QS.shape)
                        column_QS = lax.broadcast_in_dim(column_S + (begin + block) * keys, p_QS.shape, [1])
                        visible = (column_QS >= of_row(first_Q)) & (column_QS <= of_row(row_Q + base))
                        p_QS = jnp.where(visible, p_QS, 0.0)
                    p_QS = p_QS if slope is None else p_QS * slope
                    ds_QS = p_QS * (finished(dp) - of_row(delta_Q))
                    values_in.release(block)
                    begin_product(total, ds_QS.astype(dtype), block_k, *(each.at[wg] for each in staging))
                    plgpu.wgmma_wait(0)
                    keys_in.release(block)

                with_sums(body, (QUERIES, keys), (QUERIES, keys))

            def through_keys(total):
                pass_by(0, edges[0], streams)
                in_phases(functools.partial(step, total=total), edges)
                pass_by(edges[-1], end - begin, streams)
                return finished(total)

            own_q[...] = (with_sums(through_keys, (QUERIES, D)) * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, dq.at[rows, head])
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

    own = tiled((WARPGROUPS, QUERIES, D), dtype)
    kernel = computing_and_fetching(
        descend,
        WARPGROUPS,
        {"head": H, "tile": N // TILE},
        out_type=q_NHD,
        scratch_types=[
            own, own, *[tiled((depth, keys, D), dtype) for depth in stages],
            plgpu.SMEM((2, WARPGROUPS, QUERIES), jnp.float32), plgpu.SMEM((WARPGROUPS, QUERIES), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=5),
            *[barriers(depth, 1, WARPGROUPS) for depth in stages],
            [tiled((WARPGROUPS, QUERIES, keys), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )  # fmt: skip
    return kernel(q_NHD, k_NKD, v_NKD, dout_NHD, log_sums_HN, delta_HN, first_N, edges)


@functools.partial(
    jax.jit, static_argnames=("scale", "softcap", "queries", "stages", "of_keys", "of_values", "interpret")
)
def gradient_of_keys(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    log_sums_HN: jax.Array,
    delta_HN: jax.Array,
    first_N: jax.Array,
    edges: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    queries: int,
    stages: tuple[int, int],
    of_keys: bool = True,
    of_values: bool = True,
    interpret: bool = False,
) -> list[jax.Array]:
    """Of keys and values, [N, K, D] each, or one of them; `queries` in a block."""
    N, H, D = q_NHD.shape
    K, dtype = k_NKD.shape[1], q_NHD.dtype
    group, tile_size, to_log2 = H // K, WARPGROUPS * KEYS, unit(scale, softcap)
    PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
    wanted = of_keys + of_values

    def descend(q, k, v, dout, log_sums, delta, first, blocks, *rest):
        out, rest = rest[:wanted], rest[wanted:]
        (
            k_buffer, v_buffer, q_buffer, dout_buffer, numbers, first_buffer,
            ready, of_queries, of_gradients, staging,
        ) = rest  # fmt: skip
        kv_head, wg, tile = lax.axis_index("kv_head"), lax.axis_index("warpgroup"), lax.axis_index("tile")
        begin, end = blocks[tile * WARPGROUPS, 0], blocks[tile * WARPGROUPS + WARPGROUPS - 1, 3]
        count = end - begin
        log_sums_buffer, delta_buffer = numbers.at[: stages[0]], numbers.at[stages[0] :]
        queries_in, gradients_in = streams = [*map(Stream, stages, (of_queries, of_gradients))]

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            mine = tile * WARPGROUPS + wg
            edges = [blocks[mine, i] - begin for i in range(4)]
            base = mine * KEYS
            rows = pl.ds(base, KEYS)
            own_k, own_v = k_buffer.at[wg], v_buffer.at[wg]
            plgpu.copy_gmem_to_smem(k.at[rows, kv_head], own_k, ready.at[wg])
            plgpu.copy_gmem_to_smem(v.at[rows, kv_head], own_v, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            of_wg = [each.at[wg] for each in staging]

            def step(block, passed, totals, masked):
                i = passed + block  # of all heads' blocks
                of_column = lambda each: lax.broadcast_in_dim(each, (KEYS, queries), [1])

                def body(s, dp):
                    here = queries_in.wait(i)
                    block_q = q_buffer.at[here]
                    number = lambda buffer: of_column(plgpu.load(buffer, layout=PER_COLUMN))
                    begin_product(s, own_k, block_q.transpose((1, 0)))
                    s_SQ, slope = capped(finished(s), scale, softcap)
                    p_SQ = jnp.exp2(s_SQ * to_log2 - number(log_sums_buffer.at[here]))
                    if masked:
                        row_S, column_Q = places(p_SQ.shape)
                        row_SQ = lax.broadcast_in_dim(row_S + base, p_SQ.shape, [0])
                        visible = row_SQ >= number(first_buffer.at[here])
                        visible &= row_SQ <= of_column(column_Q + (begin + block) * queries)
                        p_SQ = jnp.where(visible, p_SQ, 0.0)
                    weights = lax.optimization_barrier(p_SQ.astype(dtype))
                    p_SQ = p_SQ if slope is None else p_SQ * slope
                    here = gradients_in.wait(i)
                    block_dout = dout_buffer.at[here]
                    if of_keys:
                        begin_product(dp, own_v, block_dout.transpose((1, 0)))
                    if of_values:
                        begin_product(totals[-1], weights, block_dout, *of_wg)
                    if of_keys:
                        ds_SQ = p_SQ * (
                            finished(dp, under_way=int(of_values)) - number(delta_buffer.at[here])
                        )
                    plgpu.wgmma_wait(0)
                    gradients_in.release(i)
                    if of_keys:  # registers that products read are written while none is under way
                        ds_SQ = lax.optimization_barrier(ds_SQ)
                        begin_product(totals[0], ds_SQ.astype(dtype), block_q, *of_wg)
                        plgpu.wgmma_wait(0)
                    queries_in.release(i)

                with_sums(body, (KEYS, queries), (KEYS, queries))

            def through_heads(*totals):
                @pl.loop(0, group)
                def _(member):
                    passed = member * count
                    pass_by(passed, passed + edges[0], streams)
                    in_phases(functools.partial(step, passed=passed, totals=totals), edges)
                    pass_by(passed + edges[-1], passed + count, streams)

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
                return kv_head * group + lax.div(i, count), pl.ds(
                    (begin + lax.rem(i, count)) * queries, queries
                )

            fetch(group * count, [(queries_in, queries_and_numbers), (gradients_in, gradients_and_numbers)])

    own = tiled((WARPGROUPS, KEYS, D), dtype)
    kernel = computing_and_fetching(
        descend,
        WARPGROUPS,
        {"kv_head": K, "tile": N // tile_size},
        out_type=[k_NKD] * wanted,
        scratch_types=[
            own, own, *[tiled((depth, queries, D), dtype) for depth in stages],
            plgpu.SMEM((sum(stages), queries), jnp.float32), plgpu.SMEM((stages[0], queries), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            barriers(stages[0], 3, WARPGROUPS), barriers(stages[1], 2, WARPGROUPS),
            [tiled((WARPGROUPS, KEYS, queries), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )  # fmt: skip
    return kernel(q_NHD, k_NKD, v_NKD, dout_NHD, log_sums_HN, delta_HN, first_N, edges)
