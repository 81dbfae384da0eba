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
from jaxtune.kernels.attention.mosaic_forward import LOG2_E, QUERIES, TILE, WARPGROUPS, capped, places

KEYS = 64
"""Of a warpgroup that goes through queries."""


def gradient_of_queries(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    lse_HN: jax.Array,
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
    from jaxtune.kernels.mosaic import add_product, computing_and_fetching, pl, plgpu, product, stream, tiled

    N, H, D = q_NHD.shape
    group, dtype = H // k_NKD.shape[1], q_NHD.dtype
    PER_ROW = plgpu.Layout.WGMMA.reduce(1)
    blocks_per_tile = TILE // keys

    def descend(
        q, k, v, dout, lse, delta, first, blocks, dq,
        q_buffer, dout_buffer, k_buffer, v_buffer, lse_buffer, delta_buffer, first_buffer,
        ready, k_ready, v_ready, k_used, v_used, staging,
    ):  # fmt: skip
        head, wg = lax.axis_index("head"), lax.axis_index("warpgroup")
        tile = N // TILE - 1 - lax.axis_index("tile")  # the longest first
        begin, full, own = blocks[tile, 0], blocks[tile, 1], tile * blocks_per_tile
        end = own + blocks_per_tile

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            base = tile * TILE + wg * QUERIES
            rows = pl.ds(base, QUERIES)
            own_q, own_dout = q_buffer.at[wg], dout_buffer.at[wg]
            here = lambda buffer: plgpu.load(buffer.at[wg], layout=PER_ROW)
            for source, buffer in (
                (q.at[rows, head], q_buffer), (dout.at[rows, head], dout_buffer), (lse.at[head, rows], lse_buffer),
                (delta.at[head, rows], delta_buffer), (first.at[rows], first_buffer),
            ):  # fmt: skip
                plgpu.copy_gmem_to_smem(source, buffer.at[wg], ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            lse_Q, delta_Q, first_Q = here(lse_buffer) * LOG2_E, here(delta_buffer), here(first_buffer)

            def step(block, dq_QD, masked):
                slot = lax.rem(block - begin, stages)
                of_row = lambda each: lax.broadcast_in_dim(each, (QUERIES, keys), [0])
                plgpu.barrier_wait(k_ready.at[slot])
                s_QS = product(own_q, k_buffer.at[slot].transpose((1, 0)))
                s_QS, slope = capped(s_QS, scale, softcap)
                p_QS = jnp.exp2(s_QS - of_row(lse_Q))
                if masked:
                    row, column = places(p_QS.shape, plgpu)
                    column += block * keys
                    p_QS = jnp.where((column >= of_row(first_Q)) & (column <= row + base), p_QS, 0.0)
                plgpu.barrier_wait(v_ready.at[slot])
                dp_QS = product(own_dout, v_buffer.at[slot].transpose((1, 0)))
                plgpu.barrier_arrive(v_used.at[slot])
                ds_QS = p_QS * (dp_QS - of_row(delta_Q))
                ds_QS = ds_QS if slope is None else ds_QS * slope
                dq_QD = add_product(
                    dq_QD, ds_QS.astype(dtype), k_buffer.at[slot], *(each.at[wg] for each in staging)
                )
                plgpu.barrier_arrive(k_used.at[slot])
                return dq_QD

            some, all_seen = (functools.partial(step, masked=masked) for masked in (True, False))
            dq_QD = plgpu.layout_cast(jnp.zeros((QUERIES, D), jnp.float32), plgpu.Layout.WGMMA)
            dq_QD = lax.fori_loop(begin, full, some, dq_QD)
            dq_QD = lax.fori_loop(full, own, all_seen, dq_QD)
            dq_QD = lax.fori_loop(own, end, some, dq_QD)
            own_q[...] = (dq_QD * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, dq.at[rows, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
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
    return kernel(q_NHD, k_NKD, v_NKD, dout_NHD, lse_HN, delta_HN, seen.first, seen.blocks(TILE, keys))


def gradient_of_keys(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    dout_NHD: jax.Array,
    lse_HN: jax.Array,
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
    from jaxtune.kernels.mosaic import add_product, computing_and_fetching, pl, plgpu, product, stream, tiled

    N, H, D = q_NHD.shape
    K, dtype = k_NKD.shape[1], q_NHD.dtype
    group, tile_size = H // K, WARPGROUPS * KEYS
    PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
    wanted = of_keys + of_values

    def descend(q, k, v, dout, lse, delta, first, blocks, *rest):
        out, rest = rest[:wanted], rest[wanted:]
        (
            k_buffer, v_buffer, q_buffer, dout_buffer, lse_buffer, delta_buffer, first_buffer,
            ready, q_ready, dout_ready, q_used, dout_used, staging,
        ) = rest  # fmt: skip
        kv_head, wg, tile = lax.axis_index("kv_head"), lax.axis_index("warpgroup"), lax.axis_index("tile")
        begin = tile * (tile_size // queries)
        own, full, end = begin + tile_size // queries, blocks[tile, 0], blocks[tile, 1]
        count = end - begin

        @pl.when(wg < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(232, action="increase")
            base = tile * tile_size + wg * KEYS
            rows = pl.ds(base, KEYS)
            own_k, own_v = k_buffer.at[wg], v_buffer.at[wg]
            plgpu.copy_gmem_to_smem(k.at[rows, kv_head], own_k, ready.at[wg])
            plgpu.copy_gmem_to_smem(v.at[rows, kv_head], own_v, ready.at[wg])
            plgpu.barrier_wait(ready.at[wg])
            of_wg = [each.at[wg] for each in staging]

            def step(block, gradients, member, masked):
                slot = lax.rem(member * count + block - begin, stages)
                here = lambda buffer: plgpu.load(buffer.at[slot], layout=PER_COLUMN)
                of_column = lambda each: lax.broadcast_in_dim(each, (KEYS, queries), [1])
                plgpu.barrier_wait(q_ready.at[slot])
                s_SQ = product(own_k, q_buffer.at[slot].transpose((1, 0)))
                s_SQ, slope = capped(s_SQ, scale, softcap)
                p_SQ = jnp.exp2(s_SQ - of_column(here(lse_buffer) * LOG2_E))
                if masked:
                    row, column = places(p_SQ.shape, plgpu)
                    row += base
                    visible = (row >= of_column(here(first_buffer))) & (row <= column + block * queries)
                    p_SQ = jnp.where(visible, p_SQ, 0.0)
                plgpu.barrier_wait(dout_ready.at[slot])
                dk_dv = list(gradients)
                if of_values:
                    dk_dv[-1] = add_product(dk_dv[-1], p_SQ.astype(dtype), dout_buffer.at[slot], *of_wg)
                if of_keys:
                    dp_SQ = product(own_v, dout_buffer.at[slot].transpose((1, 0)))
                    ds_SQ = p_SQ * (dp_SQ - of_column(here(delta_buffer)))
                    ds_SQ = ds_SQ if slope is None else ds_SQ * slope
                    dk_dv[0] = add_product(dk_dv[0], ds_SQ.astype(dtype), q_buffer.at[slot], *of_wg)
                plgpu.barrier_arrive(dout_used.at[slot])
                plgpu.barrier_arrive(q_used.at[slot])
                return tuple(dk_dv)

            def of_head(member, gradients):
                some, by_all = (
                    functools.partial(step, member=member, masked=masked) for masked in (True, False)
                )
                gradients = lax.fori_loop(begin, own, some, gradients)
                gradients = lax.fori_loop(own, full, by_all, gradients)
                return lax.fori_loop(full, end, some, gradients)

            zeros = lambda: plgpu.layout_cast(jnp.zeros((KEYS, D), jnp.float32), plgpu.Layout.WGMMA)
            gradients = lax.fori_loop(0, group, of_head, tuple(zeros() for _ in range(wanted)))
            places_and_factors = [(own_k, scale)] * of_keys + [(own_v, 1.0)] * of_values
            for gradient, (own_buffer, factor), target in zip(
                gradients, places_and_factors, out, strict=True
            ):
                own_buffer[...] = (gradient * factor).astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(own_buffer, target.at[rows, kv_head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")

            def of_queries(i):
                head, rows = head_and_rows(i)
                yield q.at[rows, head], q_buffer
                yield lse.at[head, rows], lse_buffer
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
        q_NHD, k_NKD, v_NKD, dout_NHD, lse_HN, delta_HN, seen.first, seen.blocks_by(tile_size, queries)
    )
