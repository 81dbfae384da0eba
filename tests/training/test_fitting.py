"""A step runs at the level that was asked for if that fits, with "auto" at the fastest that fits; else it says what
would."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import SFTConfig, SFTTrainer, device_memory
from jaxtune.errors import DeviceMemoryError
from jaxtune.language_model import LanguageModel
from jaxtune.training import fitting
from jaxtune.training.fitting import FittingStep, Size, first_fitting, kept_by, needed_by
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.optimizers import adamw
from jaxtune.training.remat import FASTEST_FIRST, candidates, remat
from jaxtune.training.step import init_state, make_step
from tests.kit import tiny
from tests.kit.compare import assert_trees_close

GB = 10**9
KEPT = {"mlp": 40 * GB, "attention": 20 * GB, "offload_attention": 0, "offload": 0}
NEEDED = {
    "mlp": Size(50 * GB),
    "attention": Size(25 * GB),
    "offload_attention": Size(3 * GB, host=16 * GB),
    "offload": Size(2 * GB, host=4 * GB),
}
TOKENS = 4 * 32
"""Of a micro-batch that needs as much; see `tiny.batch`."""


@pytest.mark.parametrize(
    ("room", "level", "compiled"),
    [
        (Size(140 * GB, 100 * GB), "mlp", ["mlp"]),
        (Size(50 * GB, 0), "mlp", ["mlp"]),
        (Size(45 * GB, 100 * GB), "attention", ["mlp", "attention"]),
        (Size(30 * GB, 100 * GB), "attention", ["attention"]),
        (Size(22 * GB, 100 * GB), "offload_attention", ["attention", "offload_attention"]),
        (Size(10 * GB, 100 * GB), "offload_attention", ["offload_attention"]),
        (Size(10 * GB, 8 * GB), "offload", ["offload_attention", "offload"]),
        (Size(2 * GB, 100 * GB), "offload", ["offload_attention", "offload"]),
        (Size(1 * GB, 100 * GB), None, ["offload_attention", "offload"]),
        (Size(10 * GB, 1 * GB), None, ["offload_attention", "offload"]),
    ],
)
def test_auto_takes_the_fastest_that_fits_and_compiles_none_that_cannot(room, level, compiled):
    seen = []

    def needed(name):
        seen.append(name)
        return NEEDED[name]

    assert first_fitting(FASTEST_FIRST, room, KEPT.__getitem__, needed) == level
    assert seen == compiled


def test_candidates():
    assert candidates("auto", memory_is_known=True) == (FASTEST_FIRST, ())
    assert candidates("auto", memory_is_known=False) == (("block",), ())
    assert candidates("none", memory_is_known=True) == (("none",), FASTEST_FIRST)
    assert candidates("block", memory_is_known=True) == (("block",), ("offload_attention", "offload"))
    assert candidates("offload", memory_is_known=True) == (("offload",), ())


@pytest.fixture(scope="module")
def model():
    return tiny.model(windows=(None,))


class MadeUp:
    """A step whose program says that it needs `size`, in proportion to a micro-batch's tokens."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def lower(self, state, params, batch):
        _, R, L = batch["tokens"].shape
        return MadeUp(self.step, Size(*(bytes * R * L // TOKENS for bytes in self.size)))

    def compile(self):
        return self

    def memory_analysis(self):
        return types.SimpleNamespace(
            temp_size_in_bytes=self.size.device, host_temp_size_in_bytes=self.size.host,
            output_size_in_bytes=GB, alias_size_in_bytes=GB,
            host_output_size_in_bytes=GB, host_alias_size_in_bytes=GB,
        )  # fmt: skip

    def __call__(self, *arguments):
        return self.step(*arguments)


@pytest.fixture(scope="module")
def run(model):
    """(what makes the step for an asked level and a room, its arguments)."""
    rate = lambda step: jnp.float32(1e-2)
    optimizer = adamw(rate, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0)
    loss_at = lambda how: unwatched(next_token_loss(model, how))
    sizes = {**NEEDED, "block": Size(12 * GB)}
    steps = {
        name: MadeUp(make_step(loss_at(remat(name)), optimizer, rate, 1.0), sizes[name]) for name in sizes
    }
    state = lambda: init_state(tiny.lora(model), optimizer)
    return (
        lambda asked, room: FittingStep(steps.__getitem__, loss_at, asked, room=lambda: room),
        (state, tiny.params(model), tiny.batch()),
    )


def test_what_is_kept_shrinks_and_is_a_part_of_what_xla_needs(model):
    params, lora, batch = tiny.params(model), tiny.lora(model), tiny.batch()
    loss_at = lambda name: unwatched(next_token_loss(model, remat(name)._replace(unrolled=False)))
    kept = {
        name: kept_by(loss_at(name), lora, params, batch) for name in ("none", "mlp", "attention", "block")
    }
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    _, R, L = batch["tokens"].shape
    inputs = R * L * model.config.hidden_size * model.config.num_layers * 4
    assert inputs <= kept["block"], "every block's input in float32"
    gradient = jax.jit(jax.grad(lambda *args: loss_at("mlp")(*args)[0]))
    micro = {name: array[0] for name, array in batch.items()}
    assert kept["mlp"] < needed_by(gradient.lower(lora, params, micro).compile()).device


def test_a_step_is_the_same_wherever_it_fits(run):
    step_in, (state, params, batch) = run
    roomy, tight = (step_in("auto", Size(free, 50 * GB)) for free in (100 * GB, 10 * GB))
    results = [step(state(), params, batch) for step in (roomy, tight)]
    assert (roomy.level, tight.level) == ("mlp", "offload_attention")
    assert_trees_close(results[0][0].trained, results[1][0].trained, 1e-5)


def test_a_new_shape_is_fitted_anew(run):
    step_in, (state, params, batch) = run
    step = step_in("auto", Size(50 * GB, 50 * GB))
    after, _ = step(state(), params, batch)
    assert step.level == "mlp"
    step(after, params, {name: np.concatenate([x] * 2, axis=1) for name, x in batch.items()})
    assert step.level == "attention"


def test_where_the_room_is_unknown_blocks_are_computed_again(run):
    step_in, (state, params, batch) = run
    step = step_in("auto", None)
    step(state(), params, batch)
    assert step.level == "block"


def test_too_little_memory_names_the_level_that_fits(run):
    step_in, (state, params, batch) = run
    arguments = (state(), params, batch)
    with pytest.raises(DeviceMemoryError) as caught:
        step_in("mlp", Size(10 * GB, 50 * GB))(*arguments)
    assert "2 x 4 x 32 tokens at gradient checkpointing 'mlp' takes 50.0 GB" in caught.value.found
    assert "10.0 GB of the device's memory and 50.0 GB of the host's" in caught.value.expected
    assert "Set use_gradient_checkpointing='offload_attention', which takes 3.0 GB" in caught.value.fix
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[:2])), "nothing ran"


@pytest.mark.parametrize(("free", "k", "takes"), [(1.2, 2, "1.0"), (0.6, 4, "0.5"), (0.3, 8, "0.3")])
@pytest.mark.parametrize("asked", ["offload", "auto", "block"])
def test_too_little_memory_names_the_batch_that_fits(run, free, k, takes, asked):
    """Of 4 rows of 32 tokens: fewer rows, then shorter ones; `piece_lengths` go along."""
    step_in, (state, params, batch) = run
    A, R, L = batch["tokens"].shape
    batch = {**batch, "piece_lengths": np.full((A, R, 2), L // 2, np.int32)}
    with pytest.raises(DeviceMemoryError) as caught:
        step_in(asked, Size(int(free * GB), 50 * GB))(state(), params, batch)
    assert f"Divide per_device_train_batch_size by {k} and multiply gradient_acc" in caught.value.fix
    assert f"with use_gradient_checkpointing='offload' that takes {takes} GB" in caught.value.fix


def test_what_xla_does_not_pin_names_the_limit(run, monkeypatch):
    """A host may have more than XLA takes of it."""
    step_in, (state, params, batch) = run
    monkeypatch.setattr(device_memory, "free_of_host", lambda: 80 * GB)
    with pytest.raises(
        DeviceMemoryError, match=r"Python with XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=4 in"
    ) as caught:
        step_in("offload", Size(10 * GB, 3 * GB))(state(), params, batch)
    assert "3.0 GB of the host's" in caught.value.expected
    monkeypatch.setattr(device_memory, "free_of_host", lambda: 3 * GB)
    with pytest.raises(DeviceMemoryError, match=r"Divide per_device_train_batch_size by 2"):
        step_in("offload", Size(10 * GB, 3 * GB))(state(), params, batch)


def test_what_a_step_has_on_the_host_already_is_pinned_too(run, monkeypatch):
    """An optimizer's state there leaves less for what a level of rematerialisation keeps."""
    step_in, (state, params, batch) = run
    held = state()
    held = held._replace(optimizer=jax.tree.map(device_memory.on_host, held.optimizer))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(held.optimizer))
    monkeypatch.setattr(device_memory, "free_of_host", lambda: 80 * GB)
    limit = (NEEDED["offload"].host + size // 2) / (1 - fitting.SLACK) / 2**30
    monkeypatch.setenv(device_memory.PINNED_LIMIT, str(limit))
    step_in("offload", Size(10 * GB, 50 * GB))(state(), params, batch)
    with pytest.raises(DeviceMemoryError, match=f"{device_memory.PINNED_LIMIT}={int(limit) + 1} in"):
        step_in("offload", Size(10 * GB, 50 * GB))(held, params, batch)


def test_a_host_gives_what_it_has_and_what_xla_pins(monkeypatch):
    memory = device_memory.Memory(free=70 * GB, limit=80 * GB)
    monkeypatch.setattr(device_memory, "of_device", lambda _: memory)
    monkeypatch.setattr(device_memory, "free_of_host", lambda: 100 * GB)
    monkeypatch.delenv(device_memory.PINNED_LIMIT, raising=False)
    assert fitting.free_room() == Size(int(68.4 * GB), int(0.98 * 64 * 2**30))
    monkeypatch.setenv(device_memory.PINNED_LIMIT, "200")
    assert fitting.free_room() == Size(int(68.4 * GB), 100 * GB)
    memory = None
    assert fitting.free_room() is None


def test_the_advice_names_the_setting_that_was_given(model, monkeypatch):
    """Through a trainer, whose batches and programs are real."""
    language_model = LanguageModel(
        model, tiny.params(model), lora=tiny.lora(model), gradient_checkpointing="mlp"
    )
    samples = [{"input_ids": list(range(1, 9))}] * 8
    settings = dict(per_device_train_batch_size=8, max_steps=1)

    def advice(**more):
        trainer = SFTTrainer(language_model, SFTConfig(**settings, **more), train_dataset=samples)
        with pytest.raises(DeviceMemoryError) as caught:
            trainer.train()
        return caught.value.fix

    # "mlp", three smaller levels, half the batch; then "mlp", "attention".
    sizes = iter([2, 2, 2, 2, 1, 2, 1])
    monkeypatch.setattr(fitting, "free_room", lambda: Size(1, GB))
    monkeypatch.setattr(fitting, "needed_by", lambda program: Size(next(sizes)))
    monkeypatch.setattr(fitting, "kept_by", lambda *_: 0)
    assert advice().startswith("Divide per_device_train_batch_size by 2 and")
    assert advice(gradient_checkpointing="mlp").startswith("Set gradient_checkpointing='attention',")


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ("mlp", "use_gradient_checkpointing='attention'"),
        ("offload", "Divide per_device_train_batch_size by 2"),
    ],
)
def test_running_out_all_the_same_says_what_is_smaller(run, monkeypatch, asked, fix):
    step_in, (state, params, batch) = run

    def run_out(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(MadeUp, "__call__", run_out)
    with pytest.raises(DeviceMemoryError, match=f"ran out of memory in a step .* {asked!r}") as caught:
        step_in(asked, Size(60 * GB, 50 * GB))(state(), params, batch)
    assert fix in caught.value.fix
    assert "free are 60.0 GB" in caught.value.found


def test_other_errors_stay_what_they_are(run, monkeypatch):
    step_in, (state, params, batch) = run

    def fail(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(MadeUp, "__call__", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        step_in("offload", Size(60 * GB, 50 * GB))(state(), params, batch)


def test_nothing_fits(run):
    step_in, (state, params, batch) = run
    with pytest.raises(DeviceMemoryError, match="a larger device, or a smaller model"):
        step_in("auto", Size(10**6, 50 * GB))(state(), params, batch)
