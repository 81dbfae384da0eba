"""The parts of a decoder: linear, norm, attention, MLP, block. They read like the architecture; each call takes its own
part of the adapter tree, or None. Constructors only shape parameters (they run under `jax.eval_shape`).

Shapes: B rows, T tokens, M model width, H heads, K key/value heads, D head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune import quant
from jaxtune.kernels.attention import attention
from jaxtune.lora import apply as lora_apply
from jaxtune.lora.tree import of_one
from jaxtune.models import rope
from jaxtune.models.cache import LayerCache
from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.table import rows


class Where(NamedTuple):
    """What every layer needs to know about the tokens: who belongs to whom, and where they stand."""

    segments_BT: jax.Array
    positions_BT: jax.Array
    kv_segments_BS: jax.Array
    kv_positions_BS: jax.Array
    turns: tuple[tuple[jax.Array, jax.Array], ...]
    """cos and sin for each of the model's ropes."""
    column: jax.Array | None
    """The cache's column that the first token goes to; None without a cache."""
    pieces_GM: jax.Array | None
    """Lengths of what lies end to end in the rows, if it does (see `kernels.attention`)."""
    seen: tuple[Any, ...]
    """What attention knows of these rows, for each of the model's windows."""


def part(lora: Any, name: str | int) -> Any:
    """A module's own part of the adapter tree."""
    return None if lora is None else lora.get(name)


def param(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape))


class Linear(nnx.Module):
    """y = x W^T (+ b), as the adapter changes it; W may be packed."""

    def __init__(self, out: int, inn: int, bias: bool = False):
        self.weight = param(out, inn)
        if bias:
            self.bias = param(out)
        self.has_bias = bias

    def __call__(self, x, lora=None, ax=None):
        y = lora_apply.product(x, self.weight.get_value(), lora, quant.matmul, ax)
        if self.has_bias:
            bias = lora_apply.bias(self.bias.get_value(), lora)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def of_one_input(module: nnx.Module, linears: Sequence[str], x: jax.Array, lora: Any) -> list[jax.Array]:
    """What linears of a module make of the same x."""
    adapters = [part(lora, name) for name in linears]
    each = zip(linears, adapters, lora_apply.inner_products(x, adapters), strict=True)
    return [getattr(module, name)(x, adapter, ax) for name, adapter, ax in each]


class Embedding(nnx.Module):
    def __init__(self, vocab: int, width: int):
        self.weight = param(vocab, width)

    def __call__(self, tokens, lora=None):
        weight = self.weight.get_value()
        if lora is not None and "weight" in lora:
            return lora["weight"][tokens].astype(weight.dtype)
        x = rows(weight, tokens)
        return x if lora is None else lora_apply.changed_rows(x, tokens, of_one(lora))


class RMSNorm(nnx.Module):
    """x / rms(x) * weight, over the last axis."""

    def __init__(self, width: int, c: ModelConfig):
        self.weight, self.eps = param(width), c.rms_norm_eps
        self.adds_one, self.rounds_last = c.norm_adds_one, c.norm_rounds_last

    def __call__(self, x_in):
        x = x_in.astype(jnp.float32)
        x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        x = x if self.rounds_last else x.astype(x_in.dtype)
        weight = self.weight.get_value().astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * (1 + weight if self.adds_one else weight)).astype(x_in.dtype)


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, kind: LayerKind):
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if c.fused_projections:
            self.qkv_proj = Linear(q + 2 * kv, c.hidden_size, c.qkv_bias)
        else:
            self.q_proj = Linear(q, c.hidden_size, c.qkv_bias)
            self.k_proj = Linear(kv, c.hidden_size, c.qkv_bias)
            self.v_proj = Linear(kv, c.hidden_size, c.qkv_bias)
        self.o_proj = Linear(c.hidden_size, q, c.o_bias)
        if c.qk_norm is not None:
            self.q_norm = RMSNorm(c.head_dim if c.qk_norm == "head" else q, c)
            self.k_norm = RMSNorm(c.head_dim if c.qk_norm == "head" else kv, c)
        self.fused, self.qk_norm, self.head_dim, self.q_size, self.kv_size = (
            c.fused_projections, c.qk_norm, c.head_dim, q, kv,
        )  # fmt: skip
        self.scale, self.softcap, self.window, self.rope, self.seen = (
            c.attention_scale, c.attention_softcap, kind.window, kind.rope, c.windows.index(kind.window),
        )  # fmt: skip

    def __call__(
        self, x_BTM: jax.Array, where: Where, lora: Any, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        q, k, v = (checkpoint_name(x_BTHD, "qkv") for x_BTHD in self._qkv(x_BTM, where, lora))
        if cache is not None:
            assert where.column is not None
            cache, k, v = cache.write(k, v, where.column)
        out_BTHD = attention(
            q,
            k,
            v,
            q_segments_BT=where.segments_BT,
            kv_segments_BS=where.kv_segments_BS,
            q_positions_BT=where.positions_BT,
            kv_positions_BS=where.kv_positions_BS,
            pieces_GM=where.pieces_GM,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            seen=where.seen[self.seen],
        )
        return self.o_proj(out_BTHD.reshape(*x_BTM.shape[:2], -1), part(lora, "o_proj")), cache

    def _qkv(self, x_BTM: jax.Array, where: Where, lora: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, heads, D], normed and turned."""
        if self.fused:
            together = self.qkv_proj(x_BTM, part(lora, "qkv_proj"))
            q, k, v = jnp.split(together, [self.q_size, self.q_size + self.kv_size], axis=-1)
        else:
            q, k, v = of_one_input(self, ("q_proj", "k_proj", "v_proj"), x_BTM, lora)
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.reshape(*x.shape[:2], -1, self.head_dim) for x in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = (rope.rotate(x, *where.turns[self.rope]) for x in (q, k))
        return q, k, v


def _gelu_tanh(x):
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": _gelu_tanh}


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        if c.fused_projections:
            self.gate_up_proj = Linear(2 * c.intermediate_size, c.hidden_size, c.mlp_bias)
        else:
            self.gate_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
            self.up_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.fused, self.activation = c.fused_projections, c.activation

    def __call__(self, x_BTM, lora):
        if self.fused:
            together = self.gate_up_proj(x_BTM, part(lora, "gate_up_proj"))
            gate, up = jnp.split(checkpoint_name(together, "gate_up"), 2, axis=-1)
        else:
            both = of_one_input(self, ("gate_proj", "up_proj"), x_BTM, lora)
            gate, up = (checkpoint_name(x, "gate_up") for x in both)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up, part(lora, "down_proj"))


def _same(x):
    return x


def _in_tiles(feed_forward, mlp, x_BTM, lora, tokens):
    """`feed_forward(mlp, x, lora)` for at most so many tokens at a time, and half of all, which keeps nothing but x and
    the weights, dequantised once for all tiles."""
    total = x_BTM.shape[0] * x_BTM.shape[1]
    tiles = max(2, -(-total // tokens))
    mlp = quant.dequantized(mlp, x_BTM.dtype)
    tokens = -(-total // tiles)  # all of one size, with as little padding as that allows
    x_TM = jnp.pad(x_BTM.reshape(total, -1), ((0, tiles * tokens - total), (0, 0)))
    one = jax.checkpoint(lambda x_TM: feed_forward(mlp, x_TM, lora), prevent_cse=False)
    y_TM = lax.map(one, x_TM.reshape(tiles, tokens, -1)).reshape(tiles * tokens, -1)
    return y_TM[:total].reshape(x_BTM.shape)


class Block(nnx.Module):
    """Attention, then the MLP, each added to what came in. Where there are norms on both sides, the one before the MLP
    is `pre_feedforward_layernorm`; where there is one, Llama calls that `post_attention_layernorm`."""

    def __init__(self, c: ModelConfig, kind: LayerKind):
        self.norms, self.multiplier = c.norms, c.residual_multiplier
        if c.norms != "post":
            self.input_layernorm = RMSNorm(c.hidden_size, c)
        self.self_attn = Attention(c, kind)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c)
        if c.norms == "both":
            self.pre_feedforward_layernorm = RMSNorm(c.hidden_size, c)
        self.mlp = MLP(c)
        if c.norms != "pre":
            self.post_feedforward_layernorm = RMSNorm(c.hidden_size, c)

    def __call__(
        self,
        x_BTM: jax.Array,
        where: Where,
        lora: Any = None,
        cache: LayerCache | None = None,
        *,
        mlp_tokens: int | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """The block's output, and its part of the cache with these tokens in it. With `mlp_tokens`, the MLP is computed
        for so many tokens at a time, if its weights are frozen in few bits and its adapter is plain."""
        before_attention, after_attention, before_mlp, after_mlp = self._norms()
        x_BTM = checkpoint_name(x_BTM, "block_input")
        attended, cache = self.self_attn(before_attention(x_BTM), where, part(lora, "self_attn"), cache)
        x_BTM = checkpoint_name(x_BTM + self._scaled(after_attention(attended)), "mid")

        def feed_forward(mlp, x_TM, lora):
            return x_TM + self._scaled(after_mlp(mlp(before_mlp(x_TM), lora)))

        lora = part(lora, "mlp")
        if mlp_tokens is None or not (quant.is_packed(self.mlp) and lora_apply.is_plain(lora)):
            return feed_forward(self.mlp, x_BTM, lora), cache
        return _in_tiles(feed_forward, self.mlp, x_BTM, lora, mlp_tokens), cache

    def _norms(self):
        if self.norms == "pre":
            return self.input_layernorm, _same, self.post_attention_layernorm, _same
        if self.norms == "post":
            return _same, self.post_attention_layernorm, _same, self.post_feedforward_layernorm
        return (
            self.input_layernorm,
            self.post_attention_layernorm,
            self.pre_feedforward_layernorm,
            self.post_feedforward_layernorm,
        )

    def _scaled(self, x):
        # In float32: 0.22, say, has no 16-bit value.
        return x if self.multiplier == 1 else (x.astype(jnp.float32) * self.multiplier).astype(x.dtype)
