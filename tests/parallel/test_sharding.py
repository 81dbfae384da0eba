"""A step on a 2 x 2 mesh, with packed arrays cut along either axis, is the step of one device."""

import jax
import numpy as np
import pytest

from jaxtune.errors import ShardingError
from jaxtune.loading.plan import abstract_params
from jaxtune.parallel.mesh import make_mesh
from jaxtune.parallel.sharding import batch_sharding, lora_shardings, param_shardings
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.optimizers import adamw
from jaxtune.training.remat import remat
from jaxtune.training.schedules import schedule
from jaxtune.training.step import init_state, make_step
from tests.kit import tiny
from tests.kit.compare import assert_trees_close

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_kv_heads": 4, "head_dim": 64}


@pytest.fixture(scope="module")
def case():
    model = tiny.model(**SIZES)
    rate = schedule("constant", 1e-2, 0, 10)
    # A large epsilon: with a small one Adam turns rounding errors in near-zero gradients into whole steps.
    optimizer = adamw(rate, beta1=0.9, beta2=0.999, epsilon=1e-3, weight_decay=0.01)
    step = make_step(unwatched(next_token_loss(model, remat("block"))), optimizer, rate, 1.0)
    return tiny.params(model), tiny.lora(model), tiny.batch(), optimizer, step


def run(case, params, lora, batch):
    *_, optimizer, step = case
    state = init_state(lora, optimizer)
    for _ in range(2):
        state, metrics = step(state, params, batch)
    return state.trained, metrics


@pytest.mark.parametrize(
    "axes",
    [{"fsdp": 2, "tensor": 2}, {"data": 2, "tensor": 2}, {"data": 2, "fsdp": 2}],
    ids=["both axes of a weight", "out (in of o and down)", "in (out of o and down)"],
)
def test_step_on_a_mesh_equals_one_device(case, axes):
    params, lora, batch, *_ = case
    expected_lora, expected = run(case, params, lora, batch)

    mesh = make_mesh(**axes)
    shardings = param_shardings(params, mesh)
    sharded = jax.device_put(params, shardings)
    codes = sharded["layers"][0][0]["mlp"]["up_proj"]["weight"].codes
    parts = axes.get("fsdp", 1) * axes.get("tensor", 1)
    assert codes.addressable_shards[0].data.size * parts == codes.size
    ours_lora, ours = run(
        case,
        sharded,
        jax.device_put(lora, lora_shardings(lora, mesh)),
        jax.device_put(batch, batch_sharding(mesh)),
    )
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-5)
    assert_trees_close(ours_lora, expected_lora, 1e-4)


def test_packed_inputs_are_cut_in_whole_tiles():
    """256 inputs are two tiles: four parts would cut through one."""
    params = abstract_params(tiny.model(**SIZES), dtype=jax.numpy.float32)
    param_shardings(params, make_mesh(fsdp=2))
    with pytest.raises(ShardingError, match="multiples of 128"):
        param_shardings(params, make_mesh(fsdp=4))


def test_what_else_an_adapter_has_follows_its_weight():
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
    up = {"m": shape(2, 512), "bias": shape(2, 512)}
    lora = {"layers": {0: {0: {"mlp": {"up_proj": up}}}}, "lm_head": {"weight": shape(128, 256)}}
    ours = lora_shardings(lora, make_mesh(fsdp=2, tensor=2))
    by_output = jax.sharding.PartitionSpec(None, "tensor")
    assert {one.spec for one in ours["layers"][0][0]["mlp"]["up_proj"].values()} == {by_output}
    low_rank = {name: {"a": shape(1, 4, 256), "b": shape(1, 128, 4)} for name in ("embed_tokens", "lm_head")}
    for one in lora_shardings(low_rank, make_mesh(fsdp=2, tensor=2)).values():
        assert one["a"].spec == jax.sharding.PartitionSpec(None, None, "fsdp")
        assert one["b"].spec == by_output
    assert ours["lm_head"]["weight"].spec == jax.sharding.PartitionSpec("tensor", "fsdp")


def test_a_mesh_needs_its_devices():
    with pytest.raises(ShardingError, match="8 devices"):
        make_mesh(fsdp=16)


def test_weights_whose_blocks_cross_rows_are_whole_everywhere():
    model = tiny.model(intermediate_size=200)
    params = tiny.params(model)
    placed = jax.device_put(params, param_shardings(params, make_mesh()))
    down = placed["layers"][0][0]["mlp"]["down_proj"]["weight"].codes
    assert down.sharding.spec == jax.sharding.PartitionSpec()
