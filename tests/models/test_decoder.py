"""The scanned stack is its layers, one after the other, also where a pattern of windows leaves a remainder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.models import names, rope
from jaxtune.models.cache import KVCache
from jaxtune.models.causal_lm import _apply
from jaxtune.models.parts import Block, Where
from tests.kit import tiny
from tests.kit.compare import assert_close

WINDOWS = (4, 4, None, 4, 4, None, 4)
"""Period 3, and one layer left over."""


@pytest.fixture(scope="module")
def case():
    model = tiny.model(windows=WINDOWS)
    tokens = np.random.default_rng(0).integers(0, 128, (2, 20)).astype(np.int32)
    return model, tiny.params(model), tiny.lora(model), tokens


apply = jax.jit(lambda model, params, lora, tokens: model.apply(params, lora, tokens), static_argnums=0)
hidden = jax.jit(
    lambda model, params, lora, tokens, positions, cache: model.hidden(
        params, lora, tokens, positions_BT=positions, cache=cache
    ),
    static_argnums=0,
)


def layer_by_layer(model, params, tokens):
    """The same weights, found by their Hugging Face names, through plain blocks in order."""
    c = model.config
    files = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(model.skeleton):
        path = names.keys(path)
        leaf = functools.reduce(lambda tree, key: tree[key], path, params)
        for i, name in enumerate(names.hf_names(c, path)):
            files[name] = jax.tree.map(lambda a, i=i: a[i], leaf) if names.is_stacked(path) else leaf
    ones = jnp.ones(tokens.shape, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    turns = tuple(rope.tables(positions, rope.frequencies(r, c.head_dim)) for r in c.ropes)
    where = Where(ones, positions, ones, positions, turns, None, None, (None,) * len(c.windows))
    x = params["embed_tokens"]["weight"][tokens]
    for i, kind in enumerate(c.layers):
        definition, state = nnx.split(jax.eval_shape(lambda kind=kind: Block(c, kind)))

        def named(path, _, i=i):
            return files[".".join(("model.layers", str(i), *names.keys(path)))]

        weights = jax.tree_util.tree_map_with_path(named, nnx.to_pure_dict(state))
        x, _ = nnx.merge(definition, weights)(x, where)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps)
    return model.logits(params, x * params["norm"]["weight"][None, None])


def test_scan_equals_layer_by_layer(case):
    model, params, _, tokens = case
    assert [(list(layers), period) for layers, period in model.config.segments] == [
        ([*range(6)], 3),
        ([6], 1),
    ]
    expected = jax.jit(lambda params: layer_by_layer(model, params, tokens))(params)
    assert_close(apply(model, params, None, tokens), expected, 1e-5)


def test_every_layer_has_its_name_once(case):
    model, *_ = case
    leaves = jax.tree_util.tree_leaves_with_path(model.skeleton)
    found = [name for path, _ in leaves for name in names.hf_names(model.config, names.keys(path))]
    assert len(found) == len(set(found)) == 3 + 9 * len(WINDOWS)
    up = ("layers", 0, 1, "mlp", "up_proj", "weight")
    assert names.hf_names(model.config, up) == [f"model.layers.{i}.mlp.up_proj.weight" for i in (1, 4)]


def test_cache_equals_one_pass_with_windows_and_adapter(case):
    model, params, lora, tokens = case
    whole = apply(model, params, lora, tokens)
    cache = KVCache.empty(model.config, 2, 24, jnp.float32)
    out = []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 20)):
        positions = jnp.broadcast_to(jnp.arange(20, dtype=jnp.int32)[piece], tokens[:, piece].shape)
        states, cache = hidden(model, params, lora, tokens[:, piece], positions, cache)
        out.append(model.logits(params, states))
    assert_close(jnp.concatenate(out, axis=1), whole, 1e-5)
    assert int(cache.used) == 20


def test_vmap_over_adapters(case):
    """A stack of adapters on one base, as a researcher would try several at once."""
    model, params, lora, tokens = case
    both = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), lora)
    logits = jax.jit(jax.vmap(lambda lora: model.apply(params, lora, tokens)))(both)
    assert_close(logits[0], apply(model, params, lora, tokens), 1e-5)


def test_one_value_of_configuration_is_one_program(case):
    """CausalLM is a static argument: equal settings must not compile again."""
    model, params, *_ = case
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def count(model, params):
        traced.append(model)
        return params["norm"]["weight"]

    count(model, params)
    count(tiny.model(windows=WINDOWS), params)
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("windows", "segments"),
    [
        ([None] * 4, [(4, 1)]),
        ([2, None] * 13, [(26, 2)]),
        (([2] * 5 + [None]) * 5, [(30, 6)]),
        (([2] * 5 + [None]) * 4 + [2] * 2, [(24, 6), (2, 2)]),  # Gemma 3 1B
        ([None] * 3 + [2] * 4, [(3, 1), (4, 1)]),  # Qwen 2 with max_window_layers
        ([2, 2, None, 2], [(2, 1), (1, 1), (1, 1)]),
        ([2], [(1, 1)]),
    ],
)
def test_the_pattern_is_found(windows, segments):
    """(layers, period) of each stretch; together they are all layers in order."""
    found = tiny.model(windows=tuple(windows)).config.segments
    assert [(len(layers), period) for layers, period in found] == segments
    assert [i for layers, _ in found for i in layers] == [*range(len(windows))]


def test_apply_without_a_jit_of_ones_own_compiles_once(case):
    model, params, _, tokens = case
    model.apply(params, None, tokens)
    programs = _apply._cache_size()
    model.apply(params, None, tokens)
    assert _apply._cache_size() == programs
