"""Optimizers in 8 bits: their codes and their steps are bitsandbytes'. Adam learns as it does in float32, in a quarter
of the memory."""

import logging

import bitsandbytes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import LanguageModel, SFTConfig, SFTTrainer
from jaxtune.errors import OptionError
from jaxtune.lora.config import LoraConfig
from jaxtune.models.causal_lm import CausalLM
from jaxtune.parallel.mesh import make_mesh
from jaxtune.training.optimizers import OPTIMIZERS, PAGED, adamw, make_optimizer
from jaxtune.training.optimizers.moments_8bit import SIGNED, SMALLEST, UNSIGNED, Packed, pack, unpack
from jaxtune.training.trainer import optimizer_of
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

MAPS = {"signed": SIGNED, "unsigned": UNSIGNED}
SETTINGS = dict(beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.1)
RATE = 1e-3


@pytest.fixture(params=MAPS)
def codes_of(request):
    return MAPS[request.param]


def theirs(codes_of):
    return bitsandbytes.functional.create_dynamic_map(signed=codes_of is SIGNED)


def exact_search(x, code):
    """bitsandbytes' nearest value, which its GPU kernels look for too. For float32 its CPU kernel rounds to a grid of
    65,536 points first: the small squares of a block become zeros."""
    return torch.ops.bitsandbytes.quantize_blockwise(x.double(), code, 256)


def spread(codes_of, shape, seed=0):
    """Numbers over nine decades, some zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(-8, 1, shape) * (rng.random(shape) < 0.9)
    return (x if codes_of is SIGNED else np.abs(x)).astype(np.float32)


# Codes


def test_the_map_is_bitsandbytes(codes_of):
    np.testing.assert_array_equal(codes_of.values, theirs(codes_of))


def test_the_nearest_value_is_found_at_every_edge(codes_of):
    """The closed form rises with x: right beside every edge, on both sides, it is right everywhere."""
    edges = codes_of.edges
    points = [edges, np.nextafter(edges, np.float32(2)), codes_of.values, np.float32([-1, 0, 1])]
    x = np.unique(np.clip(np.concatenate(points), -1 if codes_of is SIGNED else 0, 1))
    distance = np.abs(x[:, None].astype(np.float64) - codes_of.values)
    np.testing.assert_array_equal(jax.jit(codes_of.encode)(x), distance.argmin(1))


@pytest.mark.parametrize("shape", [(3, 16, 512), (3, 16, 100), (5000,), (4096,)], ids=str)
def test_codes_and_values_are_bitsandbytes(codes_of, shape):
    """Whole blocks, blocks across rows, a short last block."""
    x = spread(codes_of, shape)
    codes, absmax = exact_search(torch.from_numpy(x), theirs(codes_of))
    ours = jax.jit(lambda x: pack(x, codes_of))(x)
    np.testing.assert_array_equal(ours.codes, codes)
    np.testing.assert_array_equal(ours.absmax.reshape(-1), absmax.float())
    values = bitsandbytes.functional.dequantize_blockwise(
        codes, absmax=absmax.float(), code=theirs(codes_of), blocksize=256
    )
    np.testing.assert_array_equal(jax.jit(lambda packed: unpack(packed, codes_of))(ours), values)


def test_on_the_grid_of_bitsandbytes_cpu_kernel_codes_are_its_own(codes_of):
    x = np.linspace(-1 if codes_of is SIGNED else 0, 1, 255 * 128, dtype=np.float32).reshape(128, 255)
    grid = np.round((x + 1) / 2 * 65535)
    x = np.pad((2 * grid / 65535 - 1).astype(np.float32), ((0, 0), (0, 1)), constant_values=1)
    codes, _ = bitsandbytes.functional.quantize_blockwise(
        torch.from_numpy(x), code=theirs(codes_of), blocksize=256
    )
    np.testing.assert_array_equal(pack(jnp.asarray(x), codes_of).codes, codes)


def test_zeros_stay_zeros(codes_of):
    packed = pack(jnp.zeros((2, 4096)), codes_of)
    assert (packed.absmax == 0).all()
    assert (unpack(packed, codes_of) == 0).all()


# Steps

SHAPES = {"a": (3, 16, 512), "b": (2, 5000), "bias": (2, 3000), "small": (100,)}


def gradients(step):
    rng = np.random.default_rng(step)
    return {
        name: (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
        for name, shape in SHAPES.items()
    }


OPTIMIZER = adamw(lambda step: jnp.float32(RATE), **SETTINGS, bits=8)
UPDATE = jax.jit(OPTIMIZER.update)
LION = make_optimizer("lion_8bit", lambda step: jnp.float32(RATE), **SETTINGS)


def start():
    return {name: jnp.asarray(gradient * 0.1) for name, gradient in gradients(1000).items()}


def run(steps, optimizer=OPTIMIZER):
    weights = start()
    state = optimizer.init(weights)
    update = UPDATE if optimizer is OPTIMIZER else jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
    return weights, state


@pytest.fixture
def exact(monkeypatch):
    """bitsandbytes' optimizers on a CPU, with the search of its other kernels."""

    def search(x, code, absmax, out, blocksize):
        out[:], absmax[:] = exact_search(x, code)

    monkeypatch.setattr("bitsandbytes.backends.cpu.ops._quant_blockwise_fp32_direct", search)


def theirs_after(steps, kind, **settings):
    """Weights, and a state for each, of an optimizer that does not decay what is in its second group."""
    twin = {name: torch.nn.Parameter(torch.from_numpy(np.array(w))) for name, w in start().items()}
    groups = [
        {"params": [w for name, w in twin.items() if name != "bias"]},
        {"params": [twin["bias"]], "weight_decay": 0.0},
    ]
    optimizer = kind(groups, lr=RATE, weight_decay=SETTINGS["weight_decay"], **settings)
    for step in range(steps):
        for name, gradient in gradients(step).items():
            twin[name].grad = torch.from_numpy(gradient)
        optimizer.step()
    return {name: (w.detach().numpy(), optimizer.state[w]) for name, w in twin.items()}


def assert_moments_agree(ours, theirs):
    """All but a few codes: a rounding error of the last bit turns a code in thousands, by one."""
    if not isinstance(ours, Packed):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)
        return
    off = np.abs(ours.codes.astype(int) - theirs.numpy().astype(int))
    assert off.max() <= 1
    assert off.mean() < 1e-3


def test_twenty_steps_of_adamw_are_bitsandbytes(exact):
    """Weights to float32's rounding."""
    weights, ((state, _), *_) = run(20)
    for name, (expected, moments) in theirs_after(20, bitsandbytes.optim.AdamW8bit).items():
        assert np.abs(expected - start()[name]).max() > 5 * RATE
        np.testing.assert_allclose(weights[name], expected, rtol=0, atol=1e-2 * RATE, err_msg=name)
        assert_moments_agree(state.mean[name], moments["state1"])
        assert_moments_agree(state.square[name], moments["state2"])


def test_ten_steps_of_lion_are_bitsandbytes(exact):
    """Its steps are signs: a rounding error where a mean is all but zero is a step the other way, of one weight in
    thousands."""
    weights, ((state, _), *_) = run(10, LION)
    betas = SETTINGS["beta1"], SETTINGS["beta2"]
    for name, (expected, moments) in theirs_after(10, bitsandbytes.optim.Lion8bit, betas=betas).items():
        assert np.abs(expected - start()[name]).max() > 5 * RATE
        off = np.abs(weights[name] - expected) > 1e-2 * RATE
        assert off.mean() < 1e-3, name
        assert_moments_agree(state.mean[name], moments["state1"])


def test_a_step_is_deterministic():
    assert_trees_equal(run(3), run(3))


def test_a_trained_weight_takes_2_03_bytes_of_state():
    leaves = {"w": jax.ShapeDtypeStruct((4, 512, 1024), jnp.bfloat16)}
    state = jax.eval_shape(OPTIMIZER.init, leaves)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert size / leaves["w"].size == pytest.approx(2 + 2 * 4 / 256, rel=1e-4)


def test_small_leaves_keep_float32():
    state = OPTIMIZER.init({"small": jnp.zeros(SMALLEST - 1), "large": jnp.zeros(SMALLEST)})[0][0]
    assert state.mean["small"].dtype == state.square["small"].dtype == jnp.float32
    assert isinstance(state.mean["large"], Packed)
    assert isinstance(state.square["large"], Packed)


def test_one_leaf_at_a_time_is_in_float32():
    """With sixteen leaves the scratch memory of an update is that of a few, not of thirty-two moments."""
    leaf = jax.ShapeDtypeStruct((4, 256, 256), jnp.float32)
    tree = {str(i): leaf for i in range(16)}
    update = jax.jit(OPTIMIZER.update, donate_argnums=(0, 1))
    memory = update.lower(tree, jax.eval_shape(OPTIMIZER.init, tree), tree).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * leaf.size * 4


def test_a_cut_weight_has_a_cut_state():
    """Blocks that end with the rows of a shard need nothing of other devices."""
    mesh = make_mesh(fsdp=2, tensor=2)
    cut = NamedSharding(mesh, PartitionSpec(None, "tensor", "fsdp"))
    weights, gradient = ({"a": x} for x in np.float32(np.random.default_rng(0).normal(size=(2, 3, 16, 512))))
    expected, after = UPDATE(gradient, OPTIMIZER.init(jax.device_put(weights)), weights)

    weights, gradient = jax.device_put((weights, gradient), cut)
    state = jax.tree.map(
        lambda leaf: jax.device_put(leaf, cut) if leaf.ndim == 3 else leaf, OPTIMIZER.init(weights)
    )
    assert "all-" not in UPDATE.lower(gradient, state, weights).compile().as_text()
    ours, state = UPDATE(gradient, state, weights)
    assert state[0][0].mean["a"].codes.sharding.is_equivalent_to(cut, 3)
    assert state[0][0].mean["a"].absmax.sharding.is_equivalent_to(cut, 3)
    assert_trees_equal(state[0][0], after[0][0])
    np.testing.assert_allclose(ours["a"], expected["a"], rtol=1e-6)


# Runs


def train(**settings):
    """300 steps on 32 samples of noise, which are learnt by heart."""
    causal_lm = CausalLM(tiny.model(windows=(None,), vocab_size=models.VOCAB).config, LoraConfig(r=32))
    model = LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer())
    rows = [{"input_ids": np.random.default_rng(i).integers(0, 128, 16).tolist()} for i in range(32)]
    config = dict(
        per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=5e-3, max_steps=300
    )
    trainer = SFTTrainer(model, SFTConfig(**config, **settings), train_dataset=rows)
    trainer.train()
    return np.array([record["loss"] for record in trainer.log_history])


def test_three_hundred_steps_reach_the_loss_of_float32():
    eight, full = train(), train(optim="adamw_torch")
    assert full[-50:].mean() < full[0] / 4, "the run must learn something for the comparison to mean anything"
    assert not np.allclose(eight[:20], full[:20], rtol=1e-6), "8 bits are the default, and another optimizer"
    assert eight[-50:].mean() == pytest.approx(full[-50:].mean(), rel=0.01)


@pytest.mark.parametrize(
    "name", [name for name, kind in OPTIMIZERS.items() if kind.family in ("adamw", "lion")]
)
def test_a_name_says_the_bits(name):
    optimizer, _ = optimizer_of(SFTConfig(optim=name), total_steps=10)
    state = optimizer.init({"a": jnp.zeros(SHAPES["a"])})
    sizes = {leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.shape == SHAPES["a"]}
    assert sizes == {OPTIMIZERS[name].bits // 8}


def test_8_bits_are_the_default():
    assert SFTConfig().optim == "adamw_8bit"


@pytest.mark.parametrize("name", PAGED)
def test_a_paged_optimizer_is_taken_with_one_line(name, caplog):
    with caplog.at_level(logging.INFO, "jaxtune"):
        config = SFTConfig(optim=name)
    assert [record.getMessage() for record in caplog.records] == [
        f"SFTConfig: optim='{name}' is {PAGED[name]}: nothing is paged; "
        "offload_optimizer=True keeps its state on the host."
    ]
    paged, same = (
        optimizer_of(c, 10)[0].init({"a": jnp.zeros(SHAPES["a"])})
        for c in (config, SFTConfig(optim=PAGED[name]))
    )
    assert_trees_equal(paged, same)


@pytest.mark.parametrize(("name", "near"), [("adamw_8bits", "'adamw_8bit'"), ("adam_torch", "'adamw_torch'")])
def test_another_name_raises_and_suggests(name, near):
    with pytest.raises(OptionError, match=near):
        SFTConfig(optim=name)
