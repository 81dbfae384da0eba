"""In bfloat16, parts round where transformers' round: which float32 comparisons cannot see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from jaxtune.models.decoder import Decoder
from jaxtune.models.parts import Block, RMSNorm
from tests.kit import tiny

WIDTH = 256
NORMS = {
    "llama": (LlamaRMSNorm, {}),
    "gemma": (Gemma2RMSNorm, {"norm_adds_one": True, "norm_rounds_last": True}),
    "olmo2": (Olmo2RMSNorm, {"norm_rounds_last": True}),
}
RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 64, WIDTH)).astype(np.float32)
WEIGHT = (1 + 0.3 * RNG.standard_normal(WIDTH)).astype(np.float32)


def filled(module, **values):
    """A module that was only shaped, with values in bfloat16."""
    definition, state = nnx.split(module)
    state = nnx.to_pure_dict(state)
    for name, value in values.items():
        state[name] = {"weight": jnp.asarray(value, "bfloat16")} if name != "weight" else value
    return nnx.merge(definition, state)


def share_equal(ours, theirs):
    assert ours.dtype == jnp.bfloat16
    assert theirs.dtype == torch.bfloat16
    return (np.asarray(ours, np.float32) == theirs.detach().float().numpy()).mean()


@pytest.mark.parametrize("family", NORMS)
def test_norms(family):
    kind, switches = NORMS[family]
    theirs = kind(WIDTH, eps=1e-5).bfloat16()
    theirs.weight.data = torch.from_numpy(WEIGHT).bfloat16()
    expected = theirs(torch.from_numpy(X).bfloat16())

    def ours(other):
        c = tiny.model(**other).config
        module = filled(jax.eval_shape(lambda: RMSNorm(WIDTH, c)), weight=jnp.asarray(WEIGHT, "bfloat16"))
        return module(jnp.asarray(X, "bfloat16"))

    assert share_equal(ours(switches), expected) > 0.999
    wrong = {**switches, "norm_rounds_last": not switches.get("norm_rounds_last", False)}
    assert share_equal(ours(wrong), expected) < 0.95, "or this test could not tell"


def test_the_scale_of_embeddings_is_rounded_first():
    """sqrt(3072) is 55.4256, and 55.5 in bfloat16."""
    theirs = Gemma2TextScaledWordEmbedding(64, WIDTH, 0, embed_scale=3072**0.5).bfloat16()
    theirs.weight.data = torch.from_numpy(X[0]).bfloat16()
    model = tiny.model(vocab_size=64, hidden_size=WIDTH, embedding_multiplier=3072**0.5)
    decoder = filled(jax.eval_shape(lambda: Decoder(model.config)), embed_tokens=X[0])
    assert share_equal(decoder.embed(jnp.arange(64)[None])[0], theirs(torch.arange(64))) == 1


def test_residual_multipliers_are_not_rounded():
    """0.22 has no value in bfloat16; torch multiplies by the float32 one."""
    block = Block(tiny.model(residual_multiplier=0.22).config, tiny.model().config.layers[0])
    ours = block._scaled(jnp.asarray(X, "bfloat16"))
    assert share_equal(ours, torch.from_numpy(X).bfloat16() * 0.22) == 1
