"""The step: the same however the batch is cut, the same at every level of remat, and light on memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.errors import OptionError, TrainingError
from jaxtune.training import loop
from jaxtune.training.losses import next_token_loss, of_all_weights, unwatched
from jaxtune.training.optimizers import adamw, any_promotion
from jaxtune.training.remat import LEVELS, compiler_options, level, remat
from jaxtune.training.schedules import schedule
from jaxtune.training.step import init_state, make_step, value_and_grad
from tests.kit import tiny
from tests.kit.compare import assert_close, assert_trees_close


@pytest.fixture(scope="module")
def case():
    model = tiny.model()
    return model, tiny.params(model), tiny.lora(model)


@pytest.fixture(scope="module")
def expected(case):
    """Loss and gradient of the whole batch in one piece, nothing rematerialised."""
    model, params, lora = case
    return jax.jit(lambda *args: value_and_grad(unwatched(next_token_loss(model)), *args))(
        lora, params, cut(tiny.batch(), 1)
    )


def cut(batch, micro_batches):
    rows = {name: array.reshape(-1, array.shape[-1]) for name, array in batch.items()}
    return {name: array.reshape(micro_batches, -1, array.shape[-1]) for name, array in rows.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_gradients_do_not_fade_with_the_number_of_tokens(case, dtype):
    """The division by the tokens happens after the sum, in float32: before it, float16 would lose small gradients. The
    same batch 256 times over has the gradient of the batch."""
    model, _, lora = case
    params = tiny.params(model, dtype)
    gradient = jax.jit(lambda *args: value_and_grad(unwatched(next_token_loss(model)), *args)[1])
    once = cut(tiny.batch(rows=1, micro_batches=1), 1)
    many = {name: np.tile(array, (256, 1, 1)) for name, array in once.items()}
    assert_trees_close(gradient(lora, params, many), gradient(lora, params, once), 1e-4)


def padded(batch):
    """Every segment in a row of its own, padded on the right."""
    half = batch["tokens"].shape[-1] // 2
    fills = {"tokens": 3, "labels": -100, "segment_ids": 0, "positions": 0}
    out = {}
    for name, array in batch.items():
        halves = array.reshape(1, -1, half)
        if name == "segment_ids":
            halves = np.ones_like(halves)
        out[name] = np.pad(halves, ((0, 0), (0, 0), (0, 5)), constant_values=fills[name])
    # A label across the border of two segments exists in the packed rows only by this test's own making.
    return out


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
def test_loss_and_gradient_do_not_depend_on_the_cut(case, expected, micro_batches):
    model, params, lora = case
    ours = jax.jit(lambda *args: value_and_grad(unwatched(next_token_loss(model)), *args))(
        lora, params, cut(tiny.batch(), micro_batches)
    )
    assert_close(ours[0], expected[0], 1e-6)
    assert_trees_close(ours[1], expected[1], 1e-5)


def test_packed_equals_padded(case, expected):
    model, params, lora = case
    ours = jax.jit(lambda *args: value_and_grad(unwatched(next_token_loss(model)), *args))(
        lora, params, padded(tiny.batch())
    )
    assert_close(ours[0], expected[0], 1e-6)
    assert_trees_close(ours[1], expected[1], 1e-5)


@pytest.mark.parametrize("name", [name for name in LEVELS if name != "none"])
def test_remat_changes_nothing_but_memory(case, expected, name):
    model, params, lora = case
    loss = next_token_loss(model, remat(name))
    ours = jax.jit(lambda *args: value_and_grad(unwatched(loss), *args))(lora, params, cut(tiny.batch(), 1))
    assert_close(ours[0], expected[0], 1e-6)
    assert_trees_close(ours[1], expected[1], 1e-5)


IN_PIECES = {"mlp_tokens": 24, "head_tokens": 24}  # which do not divide 256 tokens


@pytest.mark.parametrize("name", ["offload_attention", "offload"])
@pytest.mark.parametrize("windows", [(None,), (None,) * 3, (None,) * 4, (None, 8) * 2])
def test_pieces_and_loops_of_any_length_change_nothing(name, windows):
    """One layer, an odd number, an even one, layers by turns; and pieces that do not divide the tokens."""
    model = tiny.model(windows=windows)
    args = tiny.lora(model), tiny.params(model), cut(tiny.batch(), 1)
    whole, pieces = (
        jax.jit(lambda *args, how=how: value_and_grad(unwatched(next_token_loss(model, how)), *args))(*args)
        for how in (None, remat(name)._replace(**IN_PIECES))
    )
    assert_close(pieces[0], whole[0], 1e-6)
    assert_trees_close(pieces[1], whole[1], 1e-5)


@pytest.mark.parametrize("name", ["mlp", "offload_attention", "offload"])
def test_levels_train_whole_weights_too(name):
    model = tiny.model(windows=(None,) * 3)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda spec: rng.normal(0, 0.05, spec.shape).astype("float32"), model.skeleton)
    whole, pieces = (
        jax.jit(
            lambda params, batch, how=how: value_and_grad(
                of_all_weights(unwatched(next_token_loss(model, how))), params, {}, batch
            )
        )(params, cut(tiny.batch(), 1))
        for how in (None, remat(name)._replace(**IN_PIECES))
    )
    assert_close(pieces[0], whole[0], 1e-6)
    assert_trees_close(pieces[1], whole[1], 1e-5)


@pytest.mark.parametrize("name", ["mlp", "block", "offload_attention"])
def test_levels_drop_the_same_inputs(name):
    model = tiny.model(windows=(None, None))
    model = dataclasses.replace(model, lora_config=dataclasses.replace(model.lora_config, lora_dropout=0.5))
    batch = {**cut(tiny.batch(), 1), "dropout_key": jax.random.split(jax.random.key(0), 1)}
    args = tiny.lora(model), tiny.params(model), batch
    ours, expected = (
        jax.jit(lambda *args, how=how: value_and_grad(unwatched(next_token_loss(model, how)), *args))(*args)
        for how in (remat(name)._replace(mlp_tokens=24), None)
    )
    assert_close(ours[0], expected[0], 1e-6)
    assert_trees_close(ours[1], expected[1], 1e-5)


def test_levels_keep_less_and_less(case):
    """From none to block, what the forward pass hands to the backward pass shrinks."""
    model, params, lora = case
    micro = {name: array[0] for name, array in tiny.batch().items()}

    def kept(name):
        loss = next_token_loss(model, remat(name))
        pullback = jax.eval_shape(lambda lora: jax.vjp(lambda lora: loss(lora, params, micro), lora)[1], lora)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    sizes = [kept(name) for name in ("none", "mlp", "attention", "block")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def walk(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from walk(inner)


@pytest.mark.parametrize("name", LEVELS)
def test_residuals_hold_no_copy_of_a_weight(case, name):
    """Whatever a scan of the step hands over to the backward pass, no float array has the shape of a packed weight."""
    model, _, lora = case
    params = tiny.params(model, "bfloat16")
    batch = tiny.batch(length=48)  # so that no activation has a weight's shape
    loss = next_token_loss(model, remat(name))
    jaxpr = jax.make_jaxpr(lambda lora: value_and_grad(unwatched(loss), lora, params, batch))(lora)
    weights = {shape for out_in in packed_shapes(params) for shape in (out_in, out_in[::-1])}
    handed_over = [
        var.aval for eqn in walk(jaxpr.jaxpr) if eqn.primitive.name == "scan" for var in eqn.outvars
    ]
    assert handed_over, "the step must scan for this to show anything"
    copies = [a for a in handed_over if a.shape[-2:] in weights and jnp.issubdtype(a.dtype, jnp.floating)]
    assert not copies


def test_a_naive_product_would_be_noticed():
    """The negative control: dequantise, then multiply, and the weight is among the residuals."""
    model = tiny.model()
    params = tiny.params(model, "bfloat16")
    packed = params["layers"][0][0]["mlp"]["up_proj"]["weight"]
    x = jnp.ones((48, 128), jnp.bfloat16)

    def naive(x):
        return jax.lax.scan(lambda c, w: (c, (x @ w.dequantize().T).sum()), 0, packed)[1].sum()

    jaxpr = jax.make_jaxpr(lambda x: jax.vjp(naive, x)[1](jnp.ones((), jnp.bfloat16)))(x)
    shapes = [
        v.aval.shape[-2:]
        for e in walk(jaxpr.jaxpr)
        if e.primitive.name == "scan"
        for v in e.outvars
        if v.aval.shape
    ]
    assert packed.out_in in shapes or packed.out_in[::-1] in shapes


def packed_shapes(params):
    leaves = jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "out_in"))
    return {leaf.out_in for leaf in leaves if hasattr(leaf, "out_in")}


def test_gradients_are_clipped_to_the_norm(case):
    """With plain descent as the optimizer, the update's norm is the clipped norm."""
    model, params, lora = case
    import optax

    rate = schedule("constant", 1.0, 0, 10)
    moved = {}
    for limit in (None, 1e-3):
        optimizer = any_promotion(optax.sgd(1.0))
        step = make_step(unwatched(next_token_loss(model)), optimizer, rate, limit)
        state, metrics = step(init_state(lora, optimizer), params, tiny.batch())
        moved[limit] = float(optax.tree.norm(jax.tree.map(jnp.subtract, state.trained, lora)))
    np.testing.assert_allclose(moved[None], metrics["grad_norm"], rtol=1e-4)
    np.testing.assert_allclose(moved[1e-3], 1e-3, rtol=1e-2)


def test_a_loss_that_is_not_finite_stops_the_run(case):
    model, params, lora = case
    lora = jax.tree.map(lambda x: x.at[(0,) * x.ndim].set(jnp.nan), lora)
    rate = schedule("constant", 1e-3, 0, 10)
    optimizer = adamw(rate, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    step = make_step(unwatched(next_token_loss(model)), optimizer, rate, 1.0)
    seen = []
    with pytest.raises(TrainingError, match="At step 1 the loss is nan"):
        loop.run(step, init_state(lora, optimizer), params, [(tiny.batch(), {})] * 2, seen.append)
    assert not seen


def test_options_reach_the_compiler(case):
    model, params, lora = case
    rate = lambda step: jnp.float32(1e-3)
    optimizer = adamw(rate, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    step = make_step(
        unwatched(next_token_loss(model)), optimizer, rate, 1.0, compiler_options={"xla_no_such_option": True}
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        step(init_state(lora, optimizer), params, tiny.batch())


def test_what_was_faster_so_is_left_to_cublas():
    assert compiler_options(remat("offload")) == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(remat("mlp")) == {"xla_gpu_enable_triton_gemm": False}
    assert compiler_options(remat("block")) == {}


def test_level_names():
    assert level(True) == "block"
    assert level(False) == "none"
    assert level("unsloth") == level("auto") == "auto"
    with pytest.raises(OptionError, match="'attention'"):
        level("atention")
