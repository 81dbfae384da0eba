"""An optimizer's state in the host's memory: the same steps, a leaf at a time, saved and resumed as any."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, device_memory
from jaxtune.device_memory import is_on_host
from jaxtune.errors import DeviceMemoryError, OptionError
from jaxtune.training.losses import next_token_loss, of_all_weights, unwatched
from jaxtune.training.optimizers import OPTIMIZERS, averaged, make_optimizer, offloaded, own_rates
from jaxtune.training.step import init_state, make_step
from jaxtune.training.trainer import optimizer_of
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_close

SETTINGS = dict(beta1=0.9, beta2=0.98, epsilon=1e-8, weight_decay=0.1)
SHAPES = {
    "layers": [[{"q_proj": {"a": (2, 4, 24), "b": (2, 1200, 4)}, "norm": {"weight": (2, 24)}}]],
    "norm": {"weight": (24,)},
    "embed_tokens": {"weight": (50, 16)},
}
"""One norm's path ends as another's begins; one leaf is large enough for 8 bits."""


def random_tree(seed):
    rng = np.random.default_rng(seed)
    draw = lambda shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    return jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def after_steps(optimizer, steps=3):
    weights = random_tree(1000)
    state = optimizer.init(weights)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, weights, grads):
        updates, state = optimizer.update(grads, state, weights)
        return state, jax.tree.map(jnp.add, weights, updates)

    for number in range(steps):
        state, weights = step(state, weights, random_tree(number))
    return weights, state


ALIASES = ("adamw_bnb_8bit", "adamw", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ALIASES])
def test_every_optimizer_steps_as_it_does_on_the_device(name):
    optimizer = make_optimizer(name, lambda step: jnp.float32(1e-2), rates=own_rates(3.0, 2.0), **SETTINGS)
    (weights, here), (same, there) = after_steps(optimizer), after_steps(offloaded(optimizer))
    assert_trees_close(same, weights, 1e-6)
    assert_trees_close(averaged(same, there), averaged(weights, here), 1e-6)
    assert jax.tree.structure(here) == jax.tree.structure(there)
    assert all(is_on_host(leaf) == (leaf.ndim > 0) for leaf in jax.tree.leaves(there)), "counts stay"
    assert_trees_close(*(jax.tree.leaves(state) for state in (there, here)), 1e-2)  # codes are whole numbers


def test_no_leaf_is_fetched_before_the_one_before_is_done():
    """In the program for a GPU: what is fetched comes out of a barrier with what is sent back."""
    optimizer = offloaded(make_optimizer("adamw_torch", lambda step: jnp.float32(1e-2), **SETTINGS))
    tree = random_tree(0)
    lowered = (
        jax.jit(optimizer.update).trace(tree, optimizer.init(tree), tree).lower(lowering_platforms=("cuda",))
    )
    text = lowered.as_text()
    placed = re.findall(
        r'@annotate_device_placement\((%\w+(?:#\d+)?)\).*_xla_buffer_placement = "(\w+)"', text
    )
    leaves = len(jax.tree.leaves(tree))
    assert [memory for _, memory in placed] == (["device"] * 2 + (["pinned_host"] * 2 + ["device"] * 2) * (leaves - 1)
                                                + ["pinned_host"] * 2)  # fmt: skip
    barriers = set(re.findall(r"(%\w+):\d+ = stablehlo.optimization_barrier", text))
    between = placed[2:-2]
    assert {name.split("#")[0] for name, _ in between} <= barriers


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(models.random_llama(), tmp_path_factory.mktemp("whole") / "model")


ROWS = [{"input_ids": np.random.default_rng(i).integers(5, 100, 20).tolist()} for i in range(8)]
BASE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, learning_rate=1e-3)


def train(folder, *, resume=None, **settings):
    model, _ = FastLanguageModel.from_pretrained(folder, full_finetuning=True, dtype="float32")
    trainer = SFTTrainer(model, SFTConfig(**{**BASE, **settings}), train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=resume)
    return [record["loss"] for record in trainer.log_history], model.params


def test_all_weights_are_trained_saved_and_resumed_with_it(folder, tmp_path):
    losses, params = train(folder, optim="adamw_torch")
    ours, same = train(folder, optim="adamw_torch", offload_optimizer=True, output_dir=tmp_path, save_steps=2)
    np.testing.assert_allclose(ours, losses, rtol=1e-5)
    assert_trees_close(same, params, 1e-5)
    for offload in (True, False):  # what one left the other goes on with
        resumed, again = train(
            folder, optim="adamw_torch", offload_optimizer=offload, output_dir=tmp_path, save_strategy="no",
            resume=tmp_path / "checkpoint-2",
        )  # fmt: skip
        np.testing.assert_allclose(resumed, ours, rtol=1e-5)
        assert_trees_close(again, same, 1e-5)


def test_the_step_of_all_weights_lowers_for_cuda():
    model = tiny.model(windows=(None,))
    params = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), model.skeleton)
    optimizer, rate = optimizer_of(SFTConfig(offload_optimizer=True), 10)
    step = make_step(of_all_weights(unwatched(next_token_loss(model))), optimizer, rate, 1.0)
    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), params)
    text = (
        step.trace(init_state(zeros, optimizer), {}, tiny.batch())
        .lower(lowering_platforms=("cuda",))
        .as_text()
    )
    header = text[text.index("@main") : text.index("{\n", text.index("@main"))]
    arguments, results = header.split("->")
    moments = 2 * sum(leaf.size >= 4096 for leaf in jax.tree.leaves(zeros))  # with an absmax each
    assert arguments.count("pinned_host") == results.count("pinned_host") >= 2 * moments
    assert len(re.findall(r'"pinned_host"[^%]*tf.aliasing_output', arguments)) == arguments.count(
        "pinned_host"
    )


# What does not fit


@pytest.fixture
def small_host(monkeypatch):
    monkeypatch.setattr(device_memory, "of_device", lambda device: device_memory.Memory(10**12, 10**12))
    return lambda free: monkeypatch.setattr(device_memory, "free_of_host", lambda: free)


def test_more_than_may_be_pinned_says_which_variable(small_host, monkeypatch):
    small_host(10**12)
    monkeypatch.setenv(device_memory.PINNED_LIMIT, "0.00001")
    optimizer = offloaded(make_optimizer("adamw_torch", lambda step: jnp.float32(1e-2), **SETTINGS))
    with pytest.raises(DeviceMemoryError, match=f"{device_memory.PINNED_LIMIT}=1 in its environment"):
        optimizer.init(random_tree(0))


def test_more_than_the_host_has_names_a_smaller_optimizer(small_host):
    small_host(10**4)
    optimizer = offloaded(make_optimizer("adamw_torch", lambda step: jnp.float32(1e-2), **SETTINGS))
    with pytest.raises(DeviceMemoryError, match=r"(?s)0\.1 GB of the host's memory.*adamw_8bit"):
        optimizer.init(random_tree(0))


def test_a_typo_is_noticed():
    with pytest.raises(OptionError, match="offload_optimizer='cpu'"):
        SFTConfig(offload_optimizer="cpu")
