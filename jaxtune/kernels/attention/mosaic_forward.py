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

from jaxtune.kernels.attention.intervals import Intervals

WARPGROUPS = 2
QUERIES = 64
"""Of a warpgroup: the rows of one instruction on the tensor cores."""
TILE = WARPGROUPS * QUERIES
LOG2_E = math.log2(math.e)
NEVER = -1e30
"""A score that cannot be seen. Finite, so that rows without any key stay free of NaN."""


def forward(
    q_NHD: jax.Array,
    k_NKD: jax.Array,
    v_NKD: jax.Array,
    seen: Intervals,
    *,
    scale: float,
    softcap: float | None,
    keys: int,
    stages: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output [N, H, D], and the logarithm of each softmax's denominator [H, N], in float32. `keys` in a block, `stages`
    of them in flight."""
    from jaxtune.kernels.mosaic import add_product, computing_and_fetching, pl, plgpu, product, stream, tiled

    N, H, D = q_NHD.shape
    group = H // k_NKD.shape[1]
    dtype = q_NHD.dtype
    PER_ROW = plgpu.Layout.WGMMA.reduce(1)
    blocks_per_tile = TILE // keys

    def attend(
        q, k, v, first, blocks, out, lse, q_buffer, k_buffer, v_buffer, lse_buffer, first_buffer,
        q_ready, k_ready, v_ready, k_used, v_used, staging,
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
            own_q, own_lse, own_first = q_buffer.at[wg], lse_buffer.at[wg], first_buffer.at[wg]
            plgpu.copy_gmem_to_smem(q.at[rows, head], own_q, q_ready.at[wg])
            plgpu.copy_gmem_to_smem(first.at[rows], own_first, q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])
            first_Q = plgpu.load(own_first, layout=PER_ROW)

            def step(block, carry, masked):
                out_QD, most_Q, sum_Q = carry
                slot = lax.rem(block - begin, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                s_QS = product(own_q, k_buffer.at[slot].transpose((1, 0)))
                plgpu.barrier_arrive(k_used.at[slot])
                s_QS, _ = capped(s_QS, scale, softcap)
                of_row = lambda each: lax.broadcast_in_dim(each, (QUERIES, keys), [0])
                if masked:
                    row, column = places(s_QS.shape, plgpu)
                    column += block * keys
                    visible = (column >= of_row(first_Q)) & (column <= row + base)
                    s_QS = jnp.where(visible, s_QS, NEVER)
                now_Q = jnp.maximum(most_Q, s_QS.max(axis=1))
                shrink_Q = jnp.exp2(most_Q - now_Q)
                p_QS = jnp.exp2(s_QS - of_row(now_Q))
                sum_Q = sum_Q * shrink_Q + p_QS.sum(axis=1)
                out_QD *= lax.broadcast_in_dim(shrink_Q, out_QD.shape, [0])
                plgpu.barrier_wait(v_ready.at[slot])
                out_QD = add_product(
                    out_QD, p_QS.astype(dtype), v_buffer.at[slot], *(each.at[wg] for each in staging)
                )
                plgpu.barrier_arrive(v_used.at[slot])
                return out_QD, now_Q, sum_Q

            zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
            carry = (
                plgpu.layout_cast(zeros(QUERIES, D), plgpu.Layout.WGMMA),
                plgpu.layout_cast(zeros(QUERIES) + NEVER, PER_ROW),
                plgpu.layout_cast(zeros(QUERIES), PER_ROW),
            )
            some = functools.partial(step, masked=True)
            carry = lax.fori_loop(begin, full, some, carry)
            carry = lax.fori_loop(full, own, functools.partial(step, masked=False), carry)
            carry = lax.fori_loop(own, end, some, carry)
            out_QD, most_Q, sum_Q = carry
            own_q[...] = (out_QD / lax.broadcast_in_dim(sum_Q, out_QD.shape, [0])).astype(dtype)
            own_lse[...] = (most_Q + jnp.log2(sum_Q)) / LOG2_E
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(own_q, out.at[rows, head])
            plgpu.copy_smem_to_gmem(own_lse, lse.at[head, rows])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(wg == WARPGROUPS)
        def _fetch():
            plgpu.set_max_registers(40, action="decrease")
            at = lambda i: (pl.ds((begin + i) * keys, keys), lax.div(head, group))
            of_keys = lambda i: [(k.at[at(i)], k_buffer)]
            of_values = lambda i: [(v.at[at(i)], v_buffer)]
            stream(end - begin, stages, [(of_keys, k_ready, k_used), (of_values, v_ready, v_used)])

    kernel = computing_and_fetching(
        attend,
        WARPGROUPS,
        {"head": H, "tile": N // TILE},
        out_type=(q_NHD, jax.ShapeDtypeStruct((H, N), jnp.float32)),
        scratch_types=[
            tiled((WARPGROUPS, QUERIES, D), dtype),
            tiled((stages, keys, D), dtype),
            tiled((stages, keys, D), dtype),
            plgpu.SMEM((WARPGROUPS, QUERIES), jnp.float32),
            plgpu.SMEM((WARPGROUPS, QUERIES), jnp.int32),
            plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
            plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
            [tiled((WARPGROUPS, QUERIES, keys), dtype)] if interpret else [],
        ],
        interpret=interpret,
    )
    return kernel(q_NHD, k_NKD, v_NKD, seen.first, seen.blocks(TILE, keys))


def capped(scores: jax.Array, scale: float, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Of products of queries and keys: the scores, to be exponents of 2; and what the softcap leaves of their
    gradient."""
    if softcap is None:
        return scores * (scale * LOG2_E), None
    within = jnp.tanh(scores * (scale / softcap))
    return within * (softcap * LOG2_E), 1 - within * within


def places(shape: tuple[int, ...], plgpu: Any) -> tuple[jax.Array, jax.Array]:
    """Of each entry, its row and its column."""
    row, column = (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    return row, column
