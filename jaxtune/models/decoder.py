"""The decoder: embedding, stacked blocks under `lax.scan`, final norm; and the head as a separate product.

`layers[s][p]` is one Block whose leaves carry a leading axis: the repeats of position p of segment s of the pattern.
Called with tokens it returns hidden states: logits belong to the fused loss, or to the sampler's one last token.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxtune.kernels.attention import see
from jaxtune.models import layer_loop, rope
from jaxtune.models.cache import KVCache, LayerCache
from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.layer_loop import Remat
from jaxtune.models.parts import Block, Embedding, Linear, RMSNorm, Where, part


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
        self.embedding_multiplier, self.head_dim = c.embedding_multiplier, c.head_dim
        self.windows = nnx.static(c.windows)
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
        pieces: jax.Array | None = None,
        noise_BTM: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, T, M] after the final norm, and the cache with these tokens in it. `dtype` is computed in;
        None is the embedding's. `noise_BTM` is added to what the first layer reads."""
        x_BTM = self.embed(tokens_BT, part(lora, "embed_tokens"), dtype)
        x_BTM = x_BTM if noise_BTM is None else x_BTM + noise_BTM.astype(x_BTM.dtype)
        x_BTM, cache = self.through_layers(x_BTM, segments_BT, positions_BT, lora, cache, remat, pieces)
        return self.norm(x_BTM), cache

    def through_layers(
        self,
        x_BTM: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        lora: Any = None,
        cache: KVCache | None = None,
        remat: Remat | None = None,
        pieces: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """What the last layer gives of what the first one reads."""
        column = None if cache is None else cache.used
        if cache is not None:
            pieces = None  # the cache's tokens lie before these
            cache = cache.add_columns(segments_BT, positions_BT)
        where = Where(
            segments_BT,
            positions_BT,
            segments_BT if cache is None else cache.segments_BS,
            positions_BT if cache is None else cache.positions_BS,
            tuple(rope.tables(positions_BT, np.asarray(f, np.float32), factor) for f, factor in self.ropes),
            column,
            pieces,
            tuple(see(segments_BT, pieces, window, self.head_dim) for window in self.windows),
        )
        for s, blocks in enumerate(self.layers):
            adapters = [part(part(part(lora, "layers"), s), p) for p in range(len(blocks))]
            if cache is None:
                x_BTM = _train(list(blocks), adapters, x_BTM, where, remat or Remat(policy=None))
            else:
                x_BTM, cache = _generate(list(blocks), adapters, x_BTM, where, cache, s)
        return x_BTM, cache

    def embed(self, tokens_BT: jax.Array, lora: Any = None, dtype: Any = None) -> jax.Array:
        x_BTM = self.embed_tokens(tokens_BT, lora)
        x_BTM = x_BTM if dtype is None else x_BTM.astype(dtype)
        multiplier = jnp.asarray(self.embedding_multiplier, x_BTM.dtype)
        return x_BTM if self.embedding_multiplier == 1 else x_BTM * multiplier


def _stack(c: ModelConfig, repeats: int, kind: LayerKind) -> Block:
    return jax.vmap(lambda _: Block(c, kind))(jnp.arange(repeats))


def _train(blocks: list[Block], adapters: list, x_BTM: jax.Array, where: Where, remat: Remat) -> jax.Array:
    """One segment without a cache: the super-block (its p positions, one after the other) over its repeats."""

    def one(module, x_BTM, where, lora):
        return module(x_BTM, where, lora, mlp_tokens=remat.mlp_tokens)[0]

    def super_block(x_BTM, layer, where):
        for p, (module, lora) in enumerate(zip(*layer, strict=True)):
            with jax.named_scope(f"block_{p}"):
                x_BTM = layer_loop.checkpointed(one, remat)(module, x_BTM, where, lora)
        return x_BTM

    return layer_loop.run(super_block, x_BTM, (blocks, adapters), where, remat)


def _generate(
    blocks: list[Block], adapters: list, x_BTM: jax.Array, where: Where, cache: KVCache, s: int
) -> tuple[jax.Array, KVCache]:
    """The same with segment s of a cache, which gets these tokens' keys and values."""

    def super_block(carry, layer):
        x, stacks = carry
        modules, loras, repeat = layer
        out = []
        for p, (module, lora) in enumerate(zip(modules, loras, strict=True)):
            with jax.named_scope(f"block_{p}"):
                x, mine = module(x, where, lora, LayerCache(stacks[p][0], stacks[p][1], repeat))
                out.append((mine.keys, mine.values))
        return (x, out), None

    repeats = jnp.arange(jax.tree.leaves(blocks)[0].shape[0])
    stacks = list(zip(cache.keys[s], cache.values[s], strict=True))
    (x_BTM, stacks), _ = lax.scan(super_block, (x_BTM, stacks), (blocks, adapters, repeats))
    keys, values = list(cache.keys), list(cache.values)
    keys[s], values[s] = [k for k, _ in stacks], [v for _, v in stacks]
    return x_BTM, KVCache(keys, values, cache.segments_BS, cache.positions_BS, cache.used)
