"""The decoder: embedding, stacked blocks under `lax.scan`, final norm; and the head as a separate product.

`layers[s][p]` is one Block whose leaves carry a leading axis: the repeats of position p of segment s of the pattern.
Called with tokens it returns hidden states: logits belong to the fused loss, or to the sampler's one last token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtune.models import rope
from jaxtune.models.cache import KVCache, LayerCache
from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.parts import Block, Embedding, Linear, RMSNorm, Where, part


class Remat(NamedTuple):
    """How blocks are trained; `training.remat` has the named ways."""

    policy: Callable | None
    """What a block keeps for its backward pass (see `jax.checkpoint`); None is everything."""
    unrolled: bool = False
    """Each layer a piece of the program, instead of a loop over them: what is kept then need not be copied into stacks
    and out of them again, but every layer is compiled."""


class Decoder(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nnx.List(
            nnx.List(_stack(c, len(layers) // period, c.layers[layers[p]]) for p in range(period))
            for layers, period in c.segments
        )
        self.norm = RMSNorm(c.hidden_size, c)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.vocab_size, c.hidden_size)
        self.embedding_multiplier = c.embedding_multiplier
        self.ropes = nnx.static(
            tuple((tuple(rope.frequencies(r, c.head_dim).tolist()), r.attention_factor) for r in c.ropes)
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        lora: Any = None,
        cache: KVCache | None = None,
        remat: Remat | None = None,
        dtype: Any = None,
        lengths: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, T, M] after the final norm, and the cache with these tokens in it. `dtype` is computed in;
        None is the embedding's."""
        column = None if cache is None else cache.used
        if cache is not None:
            cache = cache.add_columns(segments_BT, positions_BT)
        where = Where(
            segments_BT,
            positions_BT,
            segments_BT if cache is None else cache.segments_BS,
            positions_BT if cache is None else cache.positions_BS,
            tuple(rope.tables(positions_BT, np.asarray(f, np.float32), factor) for f, factor in self.ropes),
            column,
            None if cache is not None else lengths,
        )
        x_BTM = self.embed(tokens_BT, part(lora, "embed_tokens"), dtype)
        for s, blocks in enumerate(self.layers):
            adapters = [part(part(part(lora, "layers"), s), p) for p in range(len(blocks))]
            x_BTM, cache = _scan(list(blocks), adapters, x_BTM, where, cache, s, remat)
        return self.norm(x_BTM), cache

    def embed(self, tokens_BT: jax.Array, lora: Any = None, dtype: Any = None) -> jax.Array:
        x_BTM = self.embed_tokens(tokens_BT, lora)
        x_BTM = x_BTM if dtype is None else x_BTM.astype(dtype)
        multiplier = jnp.asarray(self.embedding_multiplier, x_BTM.dtype)
        return x_BTM if self.embedding_multiplier == 1 else x_BTM * multiplier


def _stack(c: ModelConfig, repeats: int, kind: LayerKind) -> Block:
    return jax.vmap(lambda _: Block(c, kind))(jnp.arange(repeats))


def _unstacked(stacks: Any, repeats: int) -> list[Any]:
    """Each layer's part of a tree of stacks. The gradient of a split is one concatenation; that of as many slices would
    be as many sums of whole stacks."""

    def parts(stack: jax.Array) -> list[jax.Array]:
        if jnp.issubdtype(stack.dtype, jnp.floating):
            return [part[0] for part in lax.split(stack, (1,) * repeats)]
        return [stack[i] for i in range(repeats)]

    leaves, structure = jax.tree.flatten(stacks)
    return [jax.tree.unflatten(structure, layer) for layer in zip(*map(parts, leaves), strict=True)]


def _scan(
    blocks: list[Block],
    adapters: list,
    x_BTM: jax.Array,
    where: Where,
    cache: KVCache | None,
    s: int,
    remat: Remat | None,
) -> tuple[jax.Array, KVCache | None]:
    """One segment: the super-block (its p positions, one after the other) scanned over its repeats."""

    def super_block(carry, layer):
        x, stacks = carry
        modules, loras, repeat = layer
        out = []
        for p, (module, lora) in enumerate(zip(modules, loras, strict=True)):
            with jax.named_scope(f"block_{p}"):
                mine = None if stacks is None else LayerCache(stacks[p][0], stacks[p][1], repeat)
                x, mine = module(x, where, lora, mine)
                out.append(None if mine is None else (mine.keys, mine.values))
        return (x, None if stacks is None else out), None

    if remat is not None and remat.policy is not None:
        # Inside a loop nothing can be shared between forward and backward, so CSE needs no preventing.
        super_block = jax.checkpoint(super_block, policy=remat.policy, prevent_cse=remat.unrolled)
    repeats = jax.tree.leaves(blocks)[0].shape[0]
    stacks = None if cache is None else list(zip(cache.keys[s], cache.values[s], strict=True))
    layers = (blocks, adapters, jnp.arange(repeats))
    if remat is not None and remat.unrolled:
        for layer in _unstacked(layers, repeats):
            (x_BTM, stacks), _ = super_block((x_BTM, stacks), layer)
    else:
        (x_BTM, stacks), _ = lax.scan(super_block, (x_BTM, stacks), layers)
    if cache is not None and stacks is not None:
        keys, values = list(cache.keys), list(cache.values)
        keys[s], values[s] = [k for k, _ in stacks], [v for _, v in stacks]
        cache = KVCache(keys, values, cache.segments_BS, cache.positions_BS, cache.used)
    return x_BTM, cache
