"""Optimizers in float32: on random gradients, each steps as the one that transformers' trainer has under its name."""

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.optimization import Adafactor

from jaxtune import SFTConfig
from jaxtune.errors import OptionError
from jaxtune.training.optimizers import OPTIMIZERS, averaged, make_optimizer, own_rates
from jaxtune.training.optimizers.muon import orthogonal
from jaxtune.training.schedules import schedule
from jaxtune.training.trainer import optimizer_of
from tests.kit.compare import assert_close, assert_trees_close

SETTINGS = dict(beta1=0.9, beta2=0.98, epsilon=1e-8, weight_decay=0.1)
RATE = 1e-2
STEPS = 8
PADDING = (np.arange(8) < np.array([[8], [3], [0]]))[..., None]
"""Three layers of rank 8, 3 and 0."""

SHAPES = {
    "layers": {0: {0: {
        "q_proj": {"a": (2, 4, 24), "b": (2, 40, 4), "bias": (2, 40)},
        "norm": {"weight": (2, 24)},
    }}},
    "embed_tokens": {"weight": (50, 16)},
    "lm_head": {"a": (1, 4, 16), "b": (1, 50, 4)},
}  # fmt: skip
"""Two layers' adapters, biases and norms, a table that is trained whole and a head by low rank."""


def random_tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def is_stack(path):
    return "layers" in path or "lm_head" in path


def named(tree):
    """(path, leaf) with the path as text."""
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def ours_after(name, steps=STEPS, rate=lambda step: jnp.float32(RATE), **settings):
    optimizer = make_optimizer(name, rate, **{**SETTINGS, **settings})
    update = jax.jit(optimizer.update)
    weights = jax.tree.map(jnp.asarray, random_tree(1000))
    state = optimizer.init(weights)
    for step in range(steps):
        updates, state = update(random_tree(step), state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
    return weights, state


def decay(path):
    return 0.0 if "bias" in path or "norm" in path else SETTINGS["weight_decay"]


class Twin:
    """The same weights in torch, every layer's apart, and groups as transformers' trainer makes them."""

    def __init__(self):
        self.weights = {path: self.apart(path, leaf) for path, leaf in named(random_tree(1000))}

    def apart(self, path, leaf):
        pieces = leaf if is_stack(path) else leaf[None]
        return [torch.nn.Parameter(torch.from_numpy(np.array(piece))) for piece in pieces]

    def groups(self, among=lambda path: True, ratio=lambda path: 1.0):
        """A group for each path among all."""
        return [
            {"params": pieces, "weight_decay": decay(path), "lr": RATE * ratio(path)}
            for path, pieces in self.weights.items()
            if among(path)
        ]

    def run(self, *optimizers, steps=STEPS):
        for step in range(steps):
            for path, gradient in named(random_tree(step)):
                for weight, piece in zip(self.weights[path], self.apart(path, gradient), strict=True):
                    weight.grad = piece.detach()
            for optimizer in optimizers:
                optimizer.step()
        leaves = [torch.stack(pieces).detach().numpy() for pieces in self.weights.values()]
        leaves = [x if is_stack(path) else x[0] for path, x in zip(self.weights, leaves, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(random_tree(0)), leaves)


TORCH = {
    "adamw_torch": lambda groups: torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-8),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=RATE),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=RATE),
    "adafactor": lambda groups: Adafactor(groups, lr=RATE, scale_parameter=False, relative_step=False),
    "lion_32bit": lambda groups: bitsandbytes.optim.Lion(groups, lr=RATE, betas=(0.9, 0.98), optim_bits=32),
}


@pytest.mark.parametrize("name", TORCH)
def test_steps_are_those_of_transformers_trainer(name):
    twin = Twin()
    expected = twin.run(TORCH[name](twin.groups()))
    ours, _ = ours_after(name)
    assert_trees_close(ours, expected, 1e-5)
    assert_moved(expected)


@pytest.mark.parametrize(
    ("name", "text", "theirs"),
    [
        ("sgd", "momentum=0.9", dict(momentum=0.9)),
        ("sgd", "momentum=0.9, nesterov=True", dict(momentum=0.9, nesterov=True)),
        ("rmsprop", "alpha=0.9,eps=1e-3", dict(alpha=0.9, eps=1e-3)),
        ("rmsprop", " momentum = 0.5, centered=yes ", dict(momentum=0.5, centered=True)),
    ],
)
def test_optim_args_are_torchs(name, text, theirs):
    twin = Twin()
    kind = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[name]
    expected = twin.run(kind(twin.groups(), lr=RATE, **theirs))
    assert_trees_close(ours_after(name, optim_args=text)[0], expected, 1e-5)
    assert not np.allclose(
        ours_after(name)[0]["embed_tokens"]["weight"], expected["embed_tokens"]["weight"], rtol=1e-3
    )


def test_a_config_hands_them_on():
    states = [
        optimizer_of(SFTConfig(optim="sgd", optim_args=text), 4)[0].init(random_tree(0))
        for text in (None, "momentum=0.9")
    ]
    leaves = [len(jax.tree.leaves(state)) for state in states]
    assert leaves[1] - leaves[0] == len(jax.tree.leaves(random_tree(0)))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("sgd", "momentun=0.9", r"some of momentum, nesterov .*(?s:.)*Did you mean 'momentum'"),
        ("sgd", "momentum", "momentum as a number from 0 to below 1"),
        ("sgd", "momentum=1.0", "momentum as a number from 0 to below 1"),
        ("sgd", "nesterov=True", "a momentum above 0 beside nesterov"),
        ("rmsprop", "centered=maybe", "centered=True or centered=False"),
        ("rmsprop", "eps=-1", "eps as a number from 0 on"),
        ("adamw_torch", "momentum=0.9", "none for optim='adamw_torch'"),
        ("sgd", {"momentum": 0.9}, "text such as"),
    ],
)
def test_other_optim_args_are_refused(name, text, words):
    with pytest.raises(OptionError, match=words):
        SFTConfig(optim=name, optim_args=text)


def assert_moved(weights):
    for (path, after), (_, before) in zip(named(weights), named(random_tree(1000)), strict=True):
        assert np.abs(after - before).max() > RATE, path


EMBEDDING_RATIO, LORAPLUS = 0.3, 4.0


def ratio_of(path):
    """The embedding's and the head's rate goes before that of a B."""
    if "embed_tokens" in path or "lm_head" in path:
        return EMBEDDING_RATIO
    return LORAPLUS if "'b'" in path else 1.0


@pytest.mark.parametrize("name", [*TORCH, "muon"])
def test_own_rates_are_those_of_parameter_groups(name, monkeypatch):
    """Decay included, whether it is of the gradient or of the step."""
    float32_muon(monkeypatch)
    twin = Twin()
    expected = (
        muon_twin_after(STEPS, ratio=ratio_of)
        if name == "muon"
        else twin.run(TORCH[name](twin.groups(ratio=ratio_of)))
    )
    ours, _ = ours_after(name, rates=own_rates(EMBEDDING_RATIO, LORAPLUS))
    assert_trees_close(ours, expected, 1e-5)


def test_lora_plus_alone_is_for_every_b():
    plus = own_rates(None, LORAPLUS)
    ones = jax.tree.map(jnp.ones_like, random_tree(0))
    ratios, _ = plus.update(ones, plus.init(ones))
    for path, leaf in named(ratios):
        assert (leaf == (LORAPLUS if "'b'" in path else 1.0)).all(), path


def muon_twin_after(steps, **groups):
    """torch's Muon for the matrices of the layers, its AdamW for all else."""
    twin = Twin()
    is_matrix = lambda path: "layers" in path and ("'a'" in path or "'b'" in path)
    return twin.run(
        torch.optim.Muon(twin.groups(is_matrix, **groups), lr=RATE),
        TORCH["adamw_torch"](twin.groups(lambda path: not is_matrix(path), **groups)),
        steps=steps,
    )


def float32_muon(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())


def test_muon_is_torchs_in_float32(monkeypatch):
    float32_muon(monkeypatch)
    assert_trees_close(ours_after("muon")[0], muon_twin_after(STEPS), 1e-5)


def test_muon_is_torchs_in_bfloat16_to_its_rounding():
    before, (ours, _), theirs = random_tree(1000), ours_after("muon", steps=1), muon_twin_after(1)
    moved = [jax.tree.map(np.subtract, after, before) for after in (ours, theirs)]
    assert_trees_close(*moved, 4e-2)


def test_muon_makes_singular_values_alike():
    x = jax.random.normal(jax.random.key(0), (2, 12, 8))
    values = np.linalg.svd(orthogonal(x), compute_uv=False)
    assert np.linalg.cond(x).min() > 3
    assert values.min() > 0.5
    assert values.max() < 1.5


def schedule_free_by_its_formula(gradients, weight, rates, decay):
    """x, y and z of the paper's algorithm 1, in float64; the second moment and the decay as AdamW has them."""
    beta1, beta2, epsilon = SETTINGS["beta1"], SETTINGS["beta2"], SETTINGS["epsilon"]
    x, y, z, square, total, highest = weight, weight, weight, 0.0, 0.0, 0.0
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        square = beta2 * square + (1 - beta2) * gradient**2
        z = z - rate * (gradient / (np.sqrt(square / (1 - beta2**t)) + epsilon) + decay * y)
        highest = max(highest, rate)
        total += highest**2
        share = highest**2 / total if total else 0.0
        x = (1 - share) * x + share * z
        y = (1 - beta1) * z + beta1 * x
    return x, y


@pytest.mark.parametrize("ratio", [lambda path: 1.0, ratio_of], ids=["one rate", "own rates"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedule_free_adamw_is_the_formula(warmup, ratio):
    """The trained tree is y, where gradients are computed; what a run leaves is the average x. The schedule's own
    warmup begins at 0, with steps that weigh nothing."""
    rate = schedule("linear", RATE, warmup, STEPS)
    more = {} if ratio is not ratio_of else {"rates": own_rates(EMBEDDING_RATIO, LORAPLUS)}
    y, state = ours_after("schedule_free_adamw", rate=rate, warmup_steps=warmup, **more)
    x = averaged(y, state)
    own_warmup = [min(1, (t + 1) / max(1, warmup)) for t in range(STEPS)]
    rates = [float(rate(jnp.int32(t))) * own_warmup[t] for t in range(STEPS)]
    gradients = [dict(named(random_tree(t))) for t in range(STEPS)]
    for (path, weight), (_, ours_x), (_, ours_y) in zip(
        named(random_tree(1000)), named(x), named(y), strict=True
    ):
        each = [gradient[path].astype(np.float64) for gradient in gradients]
        own = [ratio(path) * rate for rate in rates]
        expected = schedule_free_by_its_formula(each, weight.astype(np.float64), own, decay(path))
        assert_close(ours_x, expected[0], 1e-5, path)
        assert_close(ours_y, expected[1], 1e-5, path)
        assert np.abs(expected[0] - expected[1]).max() > ratio(path) * RATE / 10


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_padding_stays_zero(name):
    """What a layer of smaller rank, or without an adapter, has in the stack: weights and gradients of zero."""
    optimizer = make_optimizer(name, lambda step: jnp.float32(RATE), **SETTINGS)
    rng = np.random.default_rng(0)
    padded = lambda: jnp.asarray(rng.standard_normal((3, 8, 256)) * PADDING, jnp.float32)
    tree = lambda: {"layers": {0: {0: {"q_proj": {"a": padded(), "b": padded().mT}}}}}
    weights = tree()
    state = optimizer.init(weights)
    for _ in range(2):
        updates, state = optimizer.update(tree(), state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
    ours = weights["layers"][0][0]["q_proj"]
    for leaf in (ours["a"], ours["b"].mT):
        np.testing.assert_array_equal(leaf == 0, np.broadcast_to(PADDING == 0, leaf.shape))


def test_other_optimizers_leave_what_they_train():
    weights, state = ours_after("sgd", steps=1)
    assert averaged(weights, state) is weights
