"""Steps whose loss or gradient is not finite: they end the run, or so many in a row change nothing and are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import LanguageModel, SFTConfig, SFTTrainer
from jaxtune.errors import DivergenceError, OptionError
from jaxtune.training.step import init_state, make_step
from jaxtune.training.trainer import optimizer_of
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

OF_TOKENS = np.zeros((1, 1, 4), np.int32)


def batch(slope):
    facts = dict.fromkeys(("tokens", "labels", "segment_ids"), OF_TOKENS)
    return {**facts, "slope": np.float32([slope])}


def loss(trained, frozen, micro):
    """A slope of infinity has a finite loss, where the weight is 0."""
    return (jnp.sin(trained["layers"]["w"]) * micro["slope"]).sum(), {}


def run(slopes, **settings):
    """What the steps leave, and the rates that they report."""
    config = SFTConfig(skip_nonfinite_steps=1, learning_rate=0.1, warmup_steps=0, **settings)
    optimizer, rate = optimizer_of(config, total_steps=4)
    step = make_step(loss, optimizer, rate, 1.0)
    weights = {
        "layers": {"w": jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 256)), jnp.float32)}
    }
    state, rates = init_state(weights, optimizer), []
    for slope in slopes:
        state, metrics = step(state, {}, batch(slope))
        rates.append(float(metrics["learning_rate"]))
    return state, rates


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize(
    "settings",
    [
        *({"optim": name} for name in ("adamw_8bit", "muon", "schedule_free_adamw")),
        {"optim": "adamw_torch", "offload_optimizer": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_such_a_step_changes_nothing_but_the_place_in_the_schedule(bad, settings):
    (one, _), (two, _) = run([1.0], **settings), run([1.0, bad], **settings)
    assert_trees_equal(two.trained, one.trained)
    counts = lambda state: [
        int(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 0 and leaf.dtype == jnp.int32
    ]
    moments = lambda state: [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
    assert_trees_equal(moments(two), moments(one))
    assert sum(counts(two)) - sum(counts(one)) == 2, "the step's number, and the schedule's count"

    after, rates = run([1.0, bad, 1.0], **settings)
    np.testing.assert_allclose(rates, [0.1, 0.075, 0.05])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    if settings["optim"] == "adamw_8bit":
        moved = abs(after.trained["layers"]["w"] - two.trained["layers"]["w"]).max()
        np.testing.assert_allclose(moved, 0.05, rtol=0.05)


# In a run

MARK = 77
ROWS = [{"input_ids": [MARK if i == 5 else 3, *range(4, 20)]} for i in range(8)]
BASE = dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, max_steps=8, learning_rate=1e-2)


class Trainer(SFTTrainer):
    """Of a loss that is not finite where it meets the mark."""

    def _loss_at(self, remat):
        watched = super()._loss_at(remat)

        def marked(lora, params, micro):
            value, sums = watched(lora, params, micro)
            return jnp.where((micro["tokens"] == MARK).any(), jnp.nan, value), sums

        return marked


def trainer_of(rows=ROWS, **settings):
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    model = LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer())
    return Trainer(model, SFTConfig(**BASE, **settings), train_dataset=rows)


def test_skipped_steps_are_counted_and_in_no_mean(caplog):
    """Two epochs, in each of which one sample is bad."""
    trainer = trainer_of(skip_nonfinite_steps=1)
    output = trainer.train()
    skipped = [record for record in trainer.log_history if "loss" not in record]
    losses = [record["loss"] for record in trainer.log_history if "loss" in record]
    assert [record["skipped_steps"] for record in skipped] == [1, 2]
    assert not any("grad_norm" in record for record in skipped)
    assert [record["num_tokens"] for record in trainer.log_history] == [34 * n for n in range(1, 9)]
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert output.global_step == 8
    np.testing.assert_allclose(output.training_loss, np.mean(losses), rtol=1e-6)
    said = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert len(said) == 2
    assert all("the loss is nan" in each and "1 in a row, of at most 1" in each for each in said)
    assert all("5" in each.split("samples are ")[1].split(". It")[0].split(", ") for each in said)

    averaged = trainer_of(skip_nonfinite_steps=1, logging_steps=4)
    averaged.train()
    means = [record["loss"] for record in averaged.log_history]
    in_fours = [trainer.log_history[at : at + 4] for at in (0, 4)]
    expected = [np.mean([record["loss"] for record in four if "loss" in record]) for four in in_fours]
    np.testing.assert_allclose(means, expected, rtol=1e-6)
    assert [record["skipped_steps"] for record in averaged.log_history] == [1, 2]


def test_one_more_in_a_row_ends_the_run():
    rows = [{"input_ids": [MARK, 4, 5]}] * 4
    with pytest.raises(DivergenceError, match=r"At step 3 .*So it was in each of the 2 steps before"):
        trainer_of(rows, skip_nonfinite_steps=2).train()


def test_none_is_skipped_unasked():
    with pytest.raises(DivergenceError, match=r"the loss is nan .*its samples are"):
        trainer_of().train()


@pytest.mark.parametrize("value", [-1, True, 1.5])
def test_a_number_of_steps_is_asked_for(value):
    with pytest.raises(OptionError, match="skip_nonfinite_steps"):
        SFTConfig(skip_nonfinite_steps=value)
