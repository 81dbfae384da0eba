"""CausalLM: an architecture and its adapter's settings as one frozen value, with a language model's pure functions.

It holds no arrays. `params` is a plain nested dict (packed where quantised), `lora` the adapter's tree or None;
both are arguments, so that jit, grad and vmap see them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtune.kernels.linear_cross_entropy import Parts, product
from jaxtune.lora import apply as lora_apply
from jaxtune.lora.config import EMBEDDING, HEAD, LoraConfig
from jaxtune.lora.tree import of_one, with_settings
from jaxtune.models import names
from jaxtune.models.cache import KVCache
from jaxtune.models.config import ModelConfig
from jaxtune.models.decoder import Decoder
from jaxtune.models.layer_loop import Remat

Params = dict[str, Any]
Lora = dict[str, Any]


@functools.cache
def _define(config: ModelConfig) -> tuple[Any, dict[str, Any]]:
    definition, state = nnx.split(jax.eval_shape(lambda: Decoder(config)))
    return definition, nnx.to_pure_dict(state)


@dataclasses.dataclass(frozen=True)
class CausalLM:
    config: ModelConfig
    lora_config: LoraConfig | None = None
    compute_dtype: str | None = None
    """What is computed in; None is the dtype that the embedding is kept in."""

    @property
    def skeleton(self) -> Params:
        """The tree of `params` with shapes in place of arrays, layers stacked."""
        return jax.tree.map(lambda spec: spec, _define(self.config)[1])

    def hidden(
        self,
        params: Params,
        lora: Lora | None,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        cache: KVCache | None = None,
        piece_lengths: jax.Array | None = None,
        remat: Remat | None = None,
        dropout_key: jax.Array | None = None,
        noise_BTM: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, T, M] after the final norm, and the cache (None without one).

        `segments_BT` says which tokens see each other (0 is padding, so an attention mask will do); positions default
        to counting the real tokens of a row, which is right for one sequence per row, padded on either side.
        `piece_lengths` [G, M] promises that segments and padding lie end to end, so long each, and [B, 1] that each row
        has one segment (see `kernels.attention`). The cache must have room for all T tokens: a full one would overwrite
        its last columns. Without a `dropout_key` nothing is dropped. `noise_BTM` is added to the embeddings."""
        if segments_BT is None:
            segments_BT = jnp.ones(tokens_BT.shape, jnp.int32)
        segments_BT = jnp.asarray(segments_BT, jnp.int32)
        if positions_BT is None:
            if cache is not None:
                raise ValueError("with a cache, positions_BT must say where its new tokens stand")
            positions_BT = jnp.maximum(jnp.cumsum((segments_BT > 0).astype(jnp.int32), axis=1) - 1, 0)
        if lora is not None:
            if self.lora_config is None:
                raise ValueError(
                    "an adapter tree was given, but this CausalLM has no lora_config to scale it by"
                )
            lora = with_settings(lora, self.lora_config, self.module_names, dropout_key)
        return self.decoder(params)(
            tokens_BT,
            segments_BT,
            positions_BT,
            lora,
            cache,
            remat,
            self.dtype(params),
            piece_lengths,
            noise_BTM,
        )

    def decoder(self, params: Params) -> Decoder:
        """The module itself, with these arrays in it."""
        return nnx.merge(_define(self.config)[0], params)

    def dtype(self, params: Params) -> jnp.dtype:
        """Of hidden states, and of a cache."""
        return jnp.dtype(self.compute_dtype or params["embed_tokens"]["weight"].dtype)

    def module_names(self, path: names.Path) -> list[str]:
        """The Hugging Face name of each repeat of a stacked module."""
        return names.hf_names(self.config, path)

    def head(
        self,
        params: Params,
        hidden: jax.Array,
        lora: Lora | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[Parts, Parts]:
        """(x, w), each in parts [..., D] and [V, D], of which the sum of x w^T is the product that logits are made of:
        hidden states [..., M] and the head [V, M], the adapter's if it trains one whole; and of a low-rank change of
        the head, A x and s B."""
        weight = params[EMBEDDING if self.config.tie_word_embeddings else HEAD]["weight"]
        own = self._adapter_of_head(lora, dropout_key)
        if own is not None and "weight" in own:
            weight, own = own["weight"], None
        weight = weight.astype(hidden.dtype)
        return ((hidden,), (weight,)) if own is None else lora_apply.parts(hidden, weight, of_one(own))

    def _adapter_of_head(self, lora: Lora | None, dropout_key: jax.Array | None) -> Lora | None:
        """Of a head that remains the embedding, the embedding's."""
        if lora is None or self.lora_config is None:
            return None
        name = EMBEDDING if self.lora_config.ensure_weight_tying else HEAD
        if name not in lora:
            return None
        return with_settings(lora, self.lora_config, self.module_names, dropout_key)[name]

    def logits(self, params: Params, hidden: jax.Array, lora: Lora | None = None) -> jax.Array:
        """Hidden states [..., M] -> logits [..., V] in float32."""
        logits = product(*self.head(params, hidden, lora))
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def apply(
        self,
        params: Params,
        lora: Lora | None,
        tokens_BT: jax.Array,
        *,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
    ) -> jax.Array:
        """Logits [B, T, V] in float32 of every token. Training never calls this: see `training.losses`.

        Compiled once for each shape, so that it is as quick in a notebook as under a jit of your own."""
        return _apply(self, params, lora, tokens_BT, segments_BT, positions_BT)


@functools.partial(jax.jit, static_argnums=0)
def _apply(
    model: CausalLM,
    params: Params,
    lora: Lora | None,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None,
    positions_BT: jax.Array | None,
) -> jax.Array:
    hidden, _ = model.hidden(params, lora, tokens_BT, segments_BT=segments_BT, positions_BT=positions_BT)
    return model.logits(params, hidden, lora)
