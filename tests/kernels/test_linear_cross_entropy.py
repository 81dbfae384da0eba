"""Linear cross-entropy against logits and log-softmax written out, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy
from tests.kit.compare import assert_close

T, D, V = 37, 16, 101


def make(seed=0, dtype=jnp.float32):
    x, w, y = (jax.random.fold_in(jax.random.key(seed), i) for i in range(3))
    labels = jax.random.randint(y, (T,), 0, V).at[jnp.array([0, 5, T - 1])].set(-100)
    return jax.random.normal(x, (T, D), dtype), jax.random.normal(w, (V, D), dtype), labels


FORMS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.0},
    "all three": {"scale": 0.25, "softcap": 2.0, "temperature": 0.7},
}


def plain(x, w, labels, scale=1.0, softcap=None, temperature=1.0):
    logits = scale * (x @ w.T).astype(jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    logp = jax.nn.log_softmax(logits / temperature)
    nll = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    return jnp.where(labels == -100, 0.0, nll)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk", [1024, 16, 37])
def test_value(chunk, form):
    x, w, labels = make()
    ours = linear_cross_entropy(x, w, labels, chunk=chunk, **FORMS[form])
    assert_close(ours, plain(x, w, labels, **FORMS[form]), 1e-6)


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)], ids=["hidden", "head", "both"])
@pytest.mark.parametrize(("chunk", "form"), [(1024, "plain"), *((16, form) for form in FORMS)])
def test_gradient_for_any_weighting_of_tokens(chunk, form, argnums):
    """Unequal weights per token, as an RL loss has them."""
    x, w, labels = make()
    weights = jax.random.normal(jax.random.key(5), (T,))

    def weighted(f):
        return jax.jit(jax.grad(lambda x, w: (f(x, w) * weights).sum(), argnums))(x, w)

    ours = weighted(lambda x, w: linear_cross_entropy(x, w, labels, chunk=chunk, **FORMS[form]))
    written_out = weighted(lambda x, w: plain(x, w, labels, **FORMS[form]))
    for mine, theirs in zip(ours, written_out, strict=True):
        assert_close(mine, theirs, 1e-5)


def test_ignored_tokens_have_no_gradient():
    x, w, labels = make()
    dx = jax.grad(lambda x: linear_cross_entropy(x, w, labels).sum())(x)
    assert np.abs(np.asarray(dx)[np.asarray(labels) == -100]).max() == 0


def test_every_token_ignored():
    x, w, labels = make()
    value, dx = jax.value_and_grad(lambda x: linear_cross_entropy(x, w, jnp.full_like(labels, -100)).sum())(x)
    assert value == 0
    assert np.abs(dx).max() == 0


def test_under_vmap():
    x, w, labels = make()
    both = jax.vmap(lambda x: linear_cross_entropy(x, w, labels, chunk=16))(jnp.stack([x, 2 * x]))
    assert_close(both[1], plain(2 * x, w, labels), 1e-6)


def test_the_head_costs_nothing_while_it_is_frozen():
    """Its gradient is not computed unless asked for: no array of its size appears in the jaxpr."""
    x, w, labels = make()
    frozen = str(jax.make_jaxpr(jax.grad(lambda x: linear_cross_entropy(x, w, labels).sum()))(x))
    trained = str(jax.make_jaxpr(jax.grad(lambda w: linear_cross_entropy(x, w, labels).sum()))(w))
    size = f"f32[{V},{D}]"
    assert trained.count(size) > frozen.count(size)


def in_parts(x, w):
    return (x[:, :10], x[:, 10:]), (w[:, :10], w[:, 10:])


@pytest.mark.parametrize("form", FORMS)
def test_a_head_in_parts_is_the_head(form):
    x, w, labels = make()

    def loss(x, w):
        return linear_cross_entropy(x, w, labels, chunk=16, **FORMS[form]).sum()

    ours = jax.value_and_grad(lambda x, w: loss(*in_parts(x, w)), (0, 1))(x, w)
    whole = jax.value_and_grad(loss, (0, 1))(x, w)
    jax.tree.map(lambda mine, theirs: assert_close(mine, theirs, 1e-6), ours, whole)


def test_a_part_that_is_frozen_costs_nothing():
    """No sum of its gradient's size is begun."""
    x, w, labels = make()
    x, w = in_parts(x, w)

    def sums(argnums):
        gradient = jax.grad(lambda *w: linear_cross_entropy(x, w, labels).sum(), argnums)
        return str(jax.make_jaxpr(gradient)(*w)).count(f"f32[{V},10] = broadcast_in_dim 0.0")

    assert sums((0, 1)) == 1
    assert sums((1,)) == 0


def test_logits_of_all_tokens_never_exist():
    x, w, labels = make()
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda x: linear_cross_entropy(x, w, labels, chunk=8).sum()))(x))
    assert f"[{T},{V}]" not in jaxpr
    assert f"[8,{V}]" in jaxpr


def test_bfloat16_is_as_close_as_bfloat16_can_be():
    x, w, labels = make(dtype=jnp.bfloat16)
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    assert_close(linear_cross_entropy(x, w, labels), plain(x32, w32, labels), 1e-2)
    dx = jax.grad(lambda x: linear_cross_entropy(x, w, labels).sum())(x)
    assert dx.dtype == jnp.bfloat16
    assert_close(dx.astype(jnp.float32), jax.grad(lambda x: plain(x, w32, labels).sum())(x32), 1e-2)
