"""A tiny model as pure values, without files: for tests of steps, losses and remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.lora import init as lora_init
from jaxtune.lora.config import LoraConfig
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import LayerKind, ModelConfig, RopeConfig
from jaxtune.quant import nf4

ROPE = RopeConfig(theta=1e4)


def model(*, windows=(None, None), rope=ROPE, **overrides) -> CausalLM:
    """One layer for each window, all turned by one rope."""
    settings = dict(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32,
        rms_norm_eps=1e-5, tie_word_embeddings=False, layers=tuple(map(LayerKind, windows)), ropes=(rope,),
    )  # fmt: skip
    return CausalLM(ModelConfig(**{**settings, **overrides}), LoraConfig(r=4))


def params(causal_lm: CausalLM, dtype="float32"):
    """Random weights, the layers' linears packed."""
    rng = np.random.default_rng(0)
    quantize = jax.jit(nf4.quantize)

    def leaf(path, spec):
        w = rng.standard_normal(spec.shape) * 0.05 + ("norm" in jax.tree_util.keystr(path))
        w = jnp.asarray(w, dtype)
        packed = names.keys(path)[0] == "layers" and w.ndim == 3
        # One by one: a stack of three would be a program of its own to compile.
        return jax.tree.map(lambda *each: jnp.stack(each), *map(quantize, w)) if packed else w

    return jax.tree_util.tree_map_with_path(leaf, causal_lm.skeleton)


def lora(causal_lm: CausalLM):
    """An adapter that is already awake: B is not zero."""
    module_names = functools.partial(names.hf_names, causal_lm.config)

    def fresh():
        return lora_init.init(causal_lm.skeleton, causal_lm.lora_config, module_names, jax.random.key(0))

    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda spec: jnp.asarray(rng.standard_normal(spec.shape) * 0.05, "float32"), jax.eval_shape(fresh)
    )


def batch(*, micro_batches=2, rows=4, length=32, vocab=128, seed=1):
    """Two segments in every row, most tokens trained on."""
    rng = np.random.default_rng(seed)
    shape = (micro_batches, rows, length)
    tokens = rng.integers(0, vocab, shape).astype(np.int32)
    half = length // 2
    return {
        "tokens": tokens,
        "labels": np.where(rng.random(shape) < 0.7, np.roll(tokens, -1, -1), -100).astype(np.int32),
        "segment_ids": np.broadcast_to(np.repeat([1, 2], half), shape).astype(np.int32),
        "positions": np.broadcast_to(np.tile(np.arange(half), 2), shape).astype(np.int32),
    }
