"""What a step does to an adapter with everything in it, or with low-rank changes outside the layers, and what dropout
depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.inference.generate import generate
from jaxtune.lora import init as lora_init
from jaxtune.lora import peft_format
from jaxtune.lora.config import LoraConfig
from jaxtune.quant.nf4 import NF4Array
from jaxtune.rl.policy import log_probs, of_all_micro_batches
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.optimizers import adamw
from jaxtune.training.remat import remat
from jaxtune.training.step import dropout_keys, init_state, make_step
from tests.kit import tiny
from tests.kit.compare import assert_trees_close, assert_trees_equal, relative_rms

EVERYTHING = LoraConfig(
    r=4, rank_pattern={"q_proj": 8, "1.mlp.up_proj": 2}, target_modules=("q_proj", "up_proj"), lora_dropout=0.2,
    use_dora=True, bias="lora_only", modules_to_save=("embed_tokens", "lm_head"),
)  # fmt: skip
OUTSIDE = LoraConfig(r=4, target_modules=("embed_tokens", "lm_head", "q_proj"), lora_dropout=0.5)
RATE = lambda step: jnp.float32(1e-2)
OPTIMIZER = adamw(RATE, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1)


@pytest.fixture(scope="module", params=[EVERYTHING, OUTSIDE], ids=["everything", "outside"])
def case(request):
    """(model, packed params, an adapter that is awake)"""
    model = dataclasses.replace(tiny.model(qkv_bias=True, o_bias=True), lora_config=request.param)
    params = tiny.params(model)
    lora = lora_init.init(params, request.param, model.module_names, jax.random.key(0))
    noise = lambda one: 0.05 * rng.standard_normal(one.shape, "float32")  # not a shift of every logit alike
    rng = np.random.default_rng(0)
    awake = {name: one + noise(one) for name, one in tensors(model, lora).items()}
    return model, params, tree(model, awake)


def tensors(model, lora):
    return dict(peft_format.to_tensors(lora, model.lora_config, model.module_names))


def tree(model, by_name):
    return peft_format.from_tensors(by_name, model.lora_config, model.skeleton, model.module_names, "a test")


@pytest.fixture(scope="module")
def run(case):
    """Two steps from the beginning, as often as it is called: (losses, what the adapter is then)."""
    model, params, lora = case
    step = make_step(unwatched(next_token_loss(model, remat("block"))), OPTIMIZER, RATE, 1.0, dropout_seed=1)

    def from_the_beginning():
        state, losses = init_state(lora, OPTIMIZER), []
        for _ in range(2):
            state, metrics = step(state, params, tiny.batch(rows=2, length=16))
            losses.append(float(metrics["loss"]))
        return losses, jax.tree.map(np.asarray, state.trained)

    return from_the_beginning


@pytest.fixture(scope="module")
def trained(run):
    return run()


def test_everything_is_trained_and_padding_stays_zero(case, trained):
    model, _, lora = case
    before, after = tensors(model, lora), tensors(model, trained[1])
    for name, one in before.items():
        assert relative_rms(after[name], one) > 1e-4, name
    assert_trees_equal(trained[1], tree(model, after))


def test_a_run_drops_the_same_each_time(run, trained):
    losses, lora = run()
    assert losses == trained[0]
    assert_trees_equal(lora, trained[1])


def test_dropout_follows_from_seed_step_and_micro_batch():
    batch = tiny.batch()
    keys = [dropout_keys(seed, jnp.int32(step), batch) for seed in (0, 1) for step in (0, 1)]
    data = np.concatenate([jax.random.key_data(each) for each in keys])
    assert len(np.unique(data, axis=0)) == len(data) == 8


def test_the_reference_and_the_old_policy_drop_nothing(case):
    model, params, lora = case
    quiet = dataclasses.replace(model, lora_config=dataclasses.replace(model.lora_config, lora_dropout=0.0))
    batch = tiny.batch(rows=2, length=16)
    score = lambda model, batch: of_all_micro_batches(log_probs(model))(lora, params, batch)
    np.testing.assert_array_equal(score(model, batch), score(quiet, batch))
    keys = jax.random.split(jax.random.key(0), 2)
    assert relative_rms(score(model, {**batch, "dropout_key": keys}), score(quiet, batch)) > 1e-3


def test_dora_measures_packed_weights_as_they_are(case):
    """The same gradients from the packed base and from the values that it stands for."""
    model, params, lora = case
    is_packed = lambda leaf: isinstance(leaf, NF4Array)
    dense = jax.tree.map(lambda w: w.dequantize() if is_packed(w) else w, params, is_leaf=is_packed)
    batch = {name: array[0] for name, array in tiny.batch(rows=2, length=16).items()}
    gradient = jax.jit(jax.grad(next_token_loss(model)))
    assert_trees_close(gradient(lora, params, batch), gradient(lora, dense, batch), 1e-5)


def test_generation_uses_the_trained_head_and_embedding(case):
    model, params, lora = case
    tokens = [[3, 4, 5, 6]]
    logits = model.apply(params, lora, np.array(tokens))
    base_head = {name: leaf for name, leaf in lora.items() if name != "lm_head"}
    assert relative_rms(model.apply(params, base_head, np.array(tokens)), logits) > 1e-2
    (new,) = generate(
        model, params, lora, tokens, max_new_tokens=1, stop_ids=(), temperature=None, key=jax.random.key(0)
    )
    assert list(new) == [int(logits[0, -1].argmax())]
