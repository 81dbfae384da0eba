"""Schedules: every step's rate is that of transformers' scheduler of the same name and settings."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import get_scheduler

from jaxtune import SFTConfig
from jaxtune.errors import OptionError
from jaxtune.training.schedules import SCHEDULES, schedule
from jaxtune.training.trainer import optimizer_of

RATE = 0.5
CASES = [
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("cosine_with_min_lr", {"min_lr": 0.1}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.25}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 0.05, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 4}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "num_stable_steps": 1, "min_lr_ratio": 0.2}),
    *(
        ("warmup_stable_decay", {"num_decay_steps": 5, "warmup_type": curve, "decay_type": curve})
        for curve in ("linear", "cosine", "1-sqrt")
    ),
    ("warmup_stable_decay", {"num_decay_steps": 3, "num_cycles": 1.0}),
]


def test_every_schedule_and_every_setting_has_a_case():
    assert {kind for kind, _ in CASES} == set(SCHEDULES)
    for kind, known in SCHEDULES.items():
        assert {name for other, settings in CASES if other == kind for name in settings} == set(
            known.settings
        )


@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps")
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 12), (1, 7)])
@pytest.mark.parametrize(("kind", "settings"), CASES, ids=str)
def test_rates_are_transformers(kind, settings, warmup, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    theirs = get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=warmup,
        num_training_steps=total,
        scheduler_specific_kwargs=settings,
    )
    rate = schedule(kind, RATE, warmup, total, settings)
    for step in range(total):
        np.testing.assert_allclose(
            rate(jnp.int32(step)), theirs.get_last_lr()[0], rtol=1e-6, atol=1e-6 * RATE, err_msg=str(step)
        )
        optimizer.step()
        theirs.step()


def test_restarts_begin_exactly_where_they_should():
    """In floating point 49 * (1 / 49) is less than 1, which would be the lowest rate of a cycle, not its highest."""
    rate = schedule("cosine_with_restarts", RATE, 0, 49, {"num_cycles": 49})
    np.testing.assert_array_equal([rate(jnp.int32(step)) for step in range(49)], RATE)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("cosine", {"num_cycles": 2.0}), ("warmup_stable_decay", {"num_decay_steps": 5})],
    ids=str,
)
def test_the_settings_of_a_config_reach_its_run(kind, settings):
    config = SFTConfig(
        lr_scheduler_type=kind, lr_scheduler_kwargs=settings, warmup_steps=2, learning_rate=RATE
    )
    _, rate = optimizer_of(config, total_steps=10)
    expected = schedule(kind, RATE, 2, 10, settings)
    steps = jnp.arange(10)
    np.testing.assert_array_equal(rate(steps), expected(steps))
    assert not np.allclose(rate(steps), schedule("linear", RATE, 2, 10)(steps))


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("cosines", None, "'cosine'"),
        ("linear", {"num_cycles": 1}, "no settings, not 'num_cycles'"),
        ("cosine", {"num_cycle": 1}, "'num_cycles'"),
        ("cosine", {"num_cycles": "many"}, "num_cycles as a number"),
        ("cosine", [("num_cycles", 1)], "a dict"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "num_cycles as a whole number"),
        ("cosine_with_min_lr", None, "a dict with min_lr or min_lr_rate"),
        ("cosine_with_min_lr", None, "For example: {'min_lr_rate': 0.1}"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "not both"),
        ("polynomial", {"lr_end": 1.0}, "lr_end .* below learning_rate"),
        ("warmup_stable_decay", {}, "num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 2, "decay_type": "sqrt"}, "linear, cosine or 1-sqrt"),
    ],
    ids=str,
)
def test_a_setting_that_a_schedule_does_not_have(kind, settings, words):
    with pytest.raises(OptionError, match=words):
        SFTConfig(lr_scheduler_type=kind, lr_scheduler_kwargs=settings)
