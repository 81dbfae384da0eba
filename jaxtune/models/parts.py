"""The parts of a decoder: linear, norm, attention, MLP, block. They read like the architecture; each call takes its own
part of the adapter tree, or None. Constructors only shape parameters (they run under `jax.eval_shape`).

Shapes: B rows, T tokens, M model width, H heads, K key/value heads, D head size.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jaxtune.kernels.attention import attention
from jaxtune.lora import apply as lora_apply
from jaxtune.models import rope
from jaxtune.models.cache import LayerCache
from jaxtune.models.config import ModelConfig
from jaxtune.quant import nf4


class Where(NamedTuple):
    """What every layer needs to know about the tokens: who belongs to whom, and where they stand."""

    segments_BT: jax.Array
    positions_BT: jax.Array
    kv_segments_BS: jax.Array
    kv_positions_BS: jax.Array
    cos: jax.Array
    sin: jax.Array
    column: jax.Array | None
    """The cache's column that the first token goes to; None without a cache."""


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

    def __call__(self, x, lora=None):
        y = lora_apply.product(x, self.weight.get_value(), lora, nf4.matmul)
        if self.has_bias:
            bias = lora_apply.bias(self.bias.get_value(), lora)
            y = y + bias.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


class Embedding(nnx.Module):
    def __init__(self, vocab: int, width: int):
        self.weight = param(vocab, width)

    def __call__(self, tokens, lora=None):
        weight = self.weight.get_value()
        return weight[tokens] if lora is None else lora["weight"][tokens].astype(weight.dtype)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, eps: float):
        self.weight, self.eps = param(width), eps

    def __call__(self, x_BTM):
        x = x_BTM.astype(jnp.float32)
        x = x * lax.rsqrt((x * x).mean(-1, keepdims=True) + self.eps)
        return x.astype(x_BTM.dtype) * self.weight.get_value().astype(x_BTM.dtype)[None, None, :]


class Attention(nnx.Module):
    def __init__(self, c: ModelConfig, window: int | None):
        self.q_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.k_proj = Linear(c.num_kv_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.v_proj = Linear(c.num_kv_heads * c.head_dim, c.hidden_size, c.attention_bias)
        self.o_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, c.attention_bias)
        self.head_dim, self.scale, self.window = c.head_dim, c.attention_scale, window

    def __call__(
        self, x_BTM: jax.Array, where: Where, lora: Any, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        B, T, _ = x_BTM.shape

        def heads(name):
            return getattr(self, name)(x_BTM, part(lora, name)).reshape(B, T, -1, self.head_dim)

        q = checkpoint_name(rope.rotate(heads("q_proj"), where.cos, where.sin), "qkv")
        k = checkpoint_name(rope.rotate(heads("k_proj"), where.cos, where.sin), "qkv")
        v = checkpoint_name(heads("v_proj"), "qkv")
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
            scale=self.scale,
            window=self.window,
        )
        out = checkpoint_name(out_BTHD.reshape(B, T, -1), "attention")
        return self.o_proj(out, part(lora, "o_proj")), cache


class MLP(nnx.Module):
    def __init__(self, c: ModelConfig):
        self.gate_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.up_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)
        self.down_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)

    def __call__(self, x_BTM, lora):
        gate = checkpoint_name(self.gate_proj(x_BTM, part(lora, "gate_proj")), "gate_up")
        up = checkpoint_name(self.up_proj(x_BTM, part(lora, "up_proj")), "gate_up")
        return self.down_proj(jax.nn.silu(gate) * up, part(lora, "down_proj"))


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, window: int | None):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, window)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def __call__(
        self, x_BTM: jax.Array, where: Where, lora: Any = None, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache | None]:
        """The block's output, and its part of the cache with these tokens in it."""
        x_BTM = checkpoint_name(x_BTM, "block_input")
        attended, cache = self.self_attn(self.input_layernorm(x_BTM), where, part(lora, "self_attn"), cache)
        x_BTM = checkpoint_name(x_BTM + attended, "mid")
        return x_BTM + self.mlp(self.post_attention_layernorm(x_BTM), part(lora, "mlp")), cache
