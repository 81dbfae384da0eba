"""Linear cross-entropy and entropies against logits and log-softmax written out, values and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from jaxtune.kernels.linear_cross_entropy import chunks, linear_cross_entropy, nll_and_entropy
from tests.kit.compare import assert_trees_close, assert_trees_equal

T, D, V = 37, 16, 101


class Case(NamedTuple):
    """How many tokens of what width, and which of them have a label."""

    T: int = T
    D: int = D
    labelled: slice = slice(None)


CASES = {
    "every token labelled": Case(),
    "some": Case(labelled=slice(3, None, 4)),
    "few of many, in one chunk of 19": Case(T=300, labelled=slice(100, 290, 60)),
    "the last alone": Case(labelled=slice(T - 1, None)),
    "none": Case(labelled=slice(0)),
    "one token": Case(T=1),
    "one token, not labelled": Case(T=1, labelled=slice(0)),
    "as many as a chunk": Case(T=16),
    "one more than a chunk": Case(T=17),
    "width 576": Case(D=576),
    "width 2880": Case(D=2880),
}
FORMS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 2.0},
    "all three": {"scale": 0.25, "softcap": 2.0, "temperature": 0.7},
}


def make(case=CASES["some"], dtype=jnp.float32, ignore=-100):
    """Hidden states, a head, labels; logits are of order 1 whatever the width."""
    x, w, y = (jax.random.fold_in(jax.random.key(0), i) for i in range(3))
    labels = np.full(case.T, ignore, np.int32)
    labels[case.labelled] = np.asarray(jax.random.randint(y, (case.T,), 0, V))[case.labelled]
    head = jax.random.normal(w, (V, case.D), dtype) * (16 / case.D) ** 0.5
    return jax.random.normal(x, (case.T, case.D), dtype), head.astype(dtype), jnp.asarray(labels)


def whole_logits(x, w, scale=1.0, softcap=None, temperature=1.0):
    logits = scale * (x @ w.T).astype(jnp.float32)
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    return logits / temperature


def plain(x, w, labels, **form):
    """(nll, entropy) from whole logits."""
    logp = jax.nn.log_softmax(whole_logits(x, w, **form))
    nll = -jnp.take_along_axis(logp, jnp.maximum(labels, 0)[:, None], 1)[:, 0]
    entropy = -(jnp.exp(logp) * logp).sum(axis=1)
    return jnp.where(labels < 0, 0.0, nll), jnp.where(labels < 0, 0.0, entropy)


SMOOTHING, Z_LOSS = 0.3, 0.05


def plain_smoothed(x, w, labels, **form):
    """The label's nll and the mean over all that could have been labels."""
    nll_of = lambda label: plain(x, w, jnp.where(labels < 0, labels, label), **form)[0]
    mean = jax.vmap(nll_of)(jnp.arange(V)).mean(0)
    return (1 - SMOOTHING) * nll_of(labels) + SMOOTHING * mean


def plus_z_loss(nll):
    """And the square of the logarithm of what the softmax divides by."""

    def of(x, w, labels, **form):
        lse = jax.nn.logsumexp(whole_logits(x, w, **form), axis=1)
        return nll(x, w, labels, **form) + Z_LOSS * jnp.where(labels < 0, 0.0, lse**2)

    return of


def plain_nll(*args, **form):
    return plain(*args, **form)[0]


OPS = {
    "nll": (linear_cross_entropy, plain_nll),
    "smoothed nll": (functools.partial(linear_cross_entropy, label_smoothing=SMOOTHING), plain_smoothed),
    "nll with z-loss": (functools.partial(linear_cross_entropy, z_loss=Z_LOSS), plus_z_loss(plain_nll)),
    "smoothed nll with z-loss": (
        functools.partial(linear_cross_entropy, label_smoothing=SMOOTHING, z_loss=Z_LOSS),
        plus_z_loss(plain_smoothed),
    ),
    "nll and entropy": (nll_and_entropy, plain),
}


def values_and_gradient(op, labels, x, w, **options):
    """The gradient is by (x, w), of some weighting of tokens, as an RL loss has them, and of the two values."""

    def loss(x, w):
        values = op(x, w, labels, **options)
        leaves = jax.tree.leaves(values)
        weights = jax.random.normal(jax.random.key(5), (len(leaves), *labels.shape))
        return sum((each * weight).sum() for each, weight in zip(leaves, weights, strict=True)), values

    gradient, values = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, w)
    return values, gradient


def gradient(op, labels, x, w, **options):
    return values_and_gradient(op, labels, x, w, **options)[1]


@pytest.mark.parametrize(
    ("name", "case", "form"),
    [
        *(("nll and entropy", case, "plain") for case in CASES),
        *((name, "some", form) for name in OPS for form in FORMS),
    ],
)
def test_values_and_gradients(name, case, form):
    x, w, labels = make(CASES[case])
    ours, written_out = OPS[name]
    values, gradient = values_and_gradient(ours, labels, x, w, chunk=16, **FORMS[form])
    assert_trees_close(
        (values, gradient), values_and_gradient(written_out, labels, x, w, **FORMS[form]), 1e-5
    )
    assert_trees_close(ours(x, w, labels, chunk=16, **FORMS[form]), values, 1e-6)


@pytest.mark.parametrize("chunk", [None, 1, 37, 1024])
def test_the_chunk_changes_nothing(chunk):
    x, w, labels = make()
    ours, other = (values_and_gradient(nll_and_entropy, labels, x, w, chunk=size) for size in (chunk, 16))
    assert_trees_close(ours, other, 1e-6)


@pytest.mark.parametrize("case", ["every token labelled", "some"])
def test_values_and_gradients_are_torchs(case):
    x, w, labels = make(CASES[case])
    theirs = [torch.tensor(np.asarray(each), requires_grad=True) for each in (x, w)]
    logits, ids = theirs[0] @ theirs[1].T, torch.tensor(np.asarray(labels)).long()
    nll = torch.nn.functional.cross_entropy(logits, ids, ignore_index=-100, reduction="none")
    entropy = torch.distributions.Categorical(logits=logits).entropy() * (ids >= 0)
    (nll.sum() + 0.1 * entropy.sum()).backward()

    def loss(x, w):
        ours = nll_and_entropy(x, w, labels, chunk=16)
        return ours[0].sum() + 0.1 * ours[1].sum(), ours

    ours, (mine, entropies) = jax.grad(loss, (0, 1), has_aux=True)(x, w)
    assert_trees_close(
        [mine, entropies, *ours], [nll.detach(), entropy.detach(), *(t.grad for t in theirs)], 1e-5
    )


def test_the_entropy_of_a_uniform_softmax_is_at_its_highest():
    x, w, labels = make(CASES["every token labelled"])
    zero = jnp.zeros_like(x)
    np.testing.assert_allclose(nll_and_entropy(zero, w, labels)[1], np.log(V), rtol=1e-6)
    assert np.abs(jax.grad(lambda x: nll_and_entropy(x, w, labels)[1].sum())(zero)).max() < 1e-5
    sharp = nll_and_entropy(1000 * x, w, labels)[1]
    assert np.all((sharp >= 0) & (sharp < 1e-3)), "no cancellation among large logits"


# What is computed


@pytest.mark.parametrize(("labelled", "turns"), [(0, 0), (1, 1), (8, 1), (9, 2), (32, 4), (37, 5)])
def test_a_chunk_that_has_no_label_is_not_computed(labelled, turns):
    seen = []

    def of_chunk(x, labels):
        jax.debug.callback(seen.append, labels)
        return x

    places = np.sort(np.random.default_rng(labelled).permutation(T)[:labelled])
    labels = np.full(T, -100)
    labels[places] = places
    packed = jax.jit(functools.partial(chunks.map_labelled, of_chunk, 8))(jnp.arange(1, T + 1), labels)
    jax.effects_barrier()
    assert sorted(np.concatenate([[], *seen]).tolist()) == [-100] * (8 * turns - labelled) + places.tolist()
    np.testing.assert_array_equal(packed[:labelled], places + 1)
    np.testing.assert_array_equal(chunks.unpack(packed, labels), np.where(labels < 0, 0, np.arange(1, T + 1)))


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "chunk"),
    [
        (16384, 128_256, 1024),
        (16384, 262_144, 512),
        (16384, 32_000, 4096),
        (16384, 151_936, 768),  # 883 tokens in 512 MiB
        (16384, 4_000_000, 128),
        (1200, 128_256, 640),  # in two, with little left empty
        (300, 128_256, 300),
        (1, 128_256, 1),
    ],
)
def test_a_chunks_logits_take_512_mib_at_most(tokens, vocabulary, chunk):
    assert chunks.chunk_size(tokens, vocabulary) == chunk
    assert 4 * chunk * vocabulary <= 512 * 2**20 or chunk == 128
    assert chunks.chunk_size(tokens, vocabulary, 64) == min(64, tokens)


@pytest.mark.parametrize("op", [linear_cross_entropy, nll_and_entropy])
def test_logits_of_all_tokens_never_exist(op):
    x, w, labels = make()
    jaxpr = str(jax.make_jaxpr(functools.partial(gradient, op, labels, chunk=8))(x, w))
    assert f"[{T},{V}]" not in jaxpr
    assert f"[8,{V}]" in jaxpr


def test_the_head_costs_nothing_while_it_is_frozen():
    """Its gradient is not computed unless asked for: no array of its size appears in the jaxpr."""
    x, w, labels = make()
    frozen = str(jax.make_jaxpr(jax.grad(lambda x: linear_cross_entropy(x, w, labels).sum()))(x))
    trained = str(jax.make_jaxpr(jax.grad(lambda w: linear_cross_entropy(x, w, labels).sum()))(w))
    size = f"f32[{V},{D}]"
    assert trained.count(size) > frozen.count(size)


def test_an_entropy_to_be_watched_is_a_constant_and_costs_no_product():
    x, w, labels = make()

    def loss(x, entropy_gradient, weight=1.0):
        nll, entropy = nll_and_entropy(x, w, labels, entropy_gradient=entropy_gradient)
        return (nll + weight * entropy).sum()

    assert_trees_equal(jax.grad(loss)(x, False), jax.grad(loss)(x, True, weight=0.0))
    products = lambda of: str(jax.make_jaxpr(jax.grad(lambda x: of(x).sum()))(x)).count("dot_general")
    watched, trained = (products(lambda x, on=on: loss(x, on)) for on in (False, True))
    assert watched == products(lambda x: linear_cross_entropy(x, w, labels)) < trained


def test_a_z_loss_of_nothing_costs_nothing():
    x, w, labels = make()

    def program(**more):
        of = functools.partial(gradient, linear_cross_entropy, labels, **more)
        return str(jax.make_jaxpr(of)(x, w))

    assert program(z_loss=0.0) == program() != program(z_loss=Z_LOSS)


# Heads in parts


def in_parts(x, w):
    return (x[:, :10], x[:, 10:]), (w[:, :10], w[:, 10:])


@pytest.mark.parametrize("form", FORMS)
def test_a_head_in_parts_is_the_head(form):
    x, w, labels = make()

    def loss(x, w):
        nll, entropy = nll_and_entropy(x, w, labels, chunk=16, **FORMS[form])
        return (nll + 0.3 * entropy).sum()

    ours = jax.value_and_grad(lambda x, w: loss(*in_parts(x, w)), (0, 1))(x, w)
    whole = jax.value_and_grad(loss, (0, 1))(x, w)
    assert_trees_close(ours, whole, 1e-6)


@pytest.mark.parametrize("trained", [0, 1])
def test_of_parts_that_are_frozen_the_others_gradients_are_the_same(trained):
    x, w, labels = make()
    x, w = in_parts(x, w)
    loss = lambda *w: sum(each.sum() for each in nll_and_entropy(x, w, labels, chunk=16))
    assert_trees_equal(jax.grad(loss, trained)(*w), jax.grad(loss, (0, 1))(*w)[trained])


def test_a_part_that_is_frozen_costs_nothing():
    """No sum of its gradient's size is begun."""
    x, w, labels = make()
    x, w = in_parts(x, w)

    def sums(argnums):
        grad = jax.grad(lambda *w: linear_cross_entropy(x, w, labels).sum(), argnums)
        return str(jax.make_jaxpr(grad)(*w)).count(f"f32[{V},10] = broadcast_in_dim 0.0")

    assert sums((0, 1)) == 1
    assert sums((1,)) == 0


# Bad input


def test_zero_tokens():
    x, w, labels = make(Case(T=0))
    for values in (linear_cross_entropy(x, w, labels), *nll_and_entropy(x, w, labels)):
        assert values.shape == (0,)
        assert values.dtype == jnp.float32
    dx, dw = gradient(nll_and_entropy, labels, x, w)
    assert dx.shape == (0, D)
    assert not dw.any()


@pytest.mark.parametrize("ignore", [-1, -7, -(2**31)])
def test_any_negative_label_is_ignored(ignore):
    x, w, labels = make(ignore=ignore)
    as_usual = make()[2]
    ours, usual = (values_and_gradient(nll_and_entropy, each, x, w) for each in (labels, as_usual))
    assert_trees_equal(ours, usual)
    assert not ours[1][0][labels < 0].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_in_tokens_without_a_label_reaches_nothing(bad):
    x, w, labels = make()
    spoilt = jnp.where((labels < 0)[:, None], bad, x)
    ours, clean = (values_and_gradient(nll_and_entropy, labels, each, w, chunk=16) for each in (spoilt, x))
    assert_trees_equal(ours, clean)


def only_at(token, found, clean):
    """NaN in that token's row; every other row as it is without."""
    assert np.isnan(found[token]).all()
    assert_trees_equal(np.delete(found, token, axis=0), np.delete(clean, token, axis=0))


def test_a_nan_stays_at_its_token():
    x, w, labels = make()
    spoilt = x.at[7, 3].set(jnp.nan)
    ours, clean = (values_and_gradient(nll_and_entropy, labels, each, w, chunk=16) for each in (spoilt, x))
    (nll, entropy), (dx, dw) = ours
    for found, expected in zip((nll, entropy, dx), (*clean[0], clean[1][0]), strict=True):
        only_at(7, found, expected)
    assert np.isnan(dw).all(), "a sum over tokens"


@pytest.mark.parametrize("label", [V, V + 1, 2**31 - 1])
def test_a_label_beyond_the_vocabulary_is_nan_at_its_token(label):
    x, w, labels = make()
    wrong = labels.at[7].set(label)
    (nll, entropy), (clean_nll, clean_entropy) = (nll_and_entropy(x, w, each) for each in (wrong, labels))
    only_at(7, nll, clean_nll)
    assert_trees_equal(entropy, clean_entropy)
    only_at(7, *(gradient(linear_cross_entropy, each, x, w, chunk=16)[0] for each in (wrong, labels)))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.zeros(T - 1, np.int32), r"int32\[36\] for 37 tokens"),
        (np.zeros((T, 1), np.int32), r"int32\[37, 1\] for 37 tokens"),
        (np.zeros(T, np.float32), r"float32\[37\] for 37 tokens"),
    ],
)
def test_labels_that_are_none_are_an_error(labels, said):
    x, w, _ = make()
    with pytest.raises(ValueError, match=said):
        linear_cross_entropy(x, w, labels)


def test_a_chunk_of_no_tokens_is_an_error():
    with pytest.raises(ValueError, match="chunk=0"):
        linear_cross_entropy(*make(), chunk=0)


def test_bfloat16_is_as_close_as_bfloat16_can_be():
    x, w, labels = make(dtype=jnp.bfloat16)
    x32, w32 = x.astype(jnp.float32), w.astype(jnp.float32)
    ours = values_and_gradient(nll_and_entropy, labels, x, w)
    assert [each.dtype for each in jax.tree.leaves(ours)] == 2 * [jnp.float32] + 2 * [jnp.bfloat16]
    assert_trees_close(ours, values_and_gradient(plain, labels, x32, w32), 1e-2)


# Transformations


def test_under_vmap():
    """Each with labels of its own, of which one has none."""
    x, w, labels = make()
    x, labels = (
        jnp.stack([x, 2 * x, x]),
        jnp.stack([labels, jnp.roll(labels, 1), jnp.full_like(labels, -100)]),
    )
    ours = jax.vmap(lambda x, labels: values_and_gradient(nll_and_entropy, labels, x, w, chunk=16))(x, labels)
    theirs = jax.vmap(lambda x, labels: values_and_gradient(plain, labels, x, w))(x, labels)
    assert_trees_close(ours, theirs, 1e-5)


def test_under_shard_map():
    """Tokens on four devices, of which one has no label at all: each turns as often as it has to."""
    x, w, labels = make(Case(T=64, labelled=slice(20, None)))
    tokens, everywhere = PartitionSpec("data"), PartitionSpec()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    split = jax.shard_map(
        functools.partial(nll_and_entropy, chunk=8),
        mesh=mesh, in_specs=(tokens, everywhere, tokens), out_specs=(tokens, tokens),
    )  # fmt: skip

    def values_and_dx(op):
        values, pullback = jax.vjp(lambda x: op(x, w, labels), x)
        return values, pullback((jnp.ones(64), jnp.linspace(-1, 1, 64)))

    assert_trees_close(*(jax.jit(functools.partial(values_and_dx, op))() for op in (split, plain)), 1e-5)
