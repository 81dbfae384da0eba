"""Every kernel case at a tiny size, by every implementation that runs here; `tests/gpu` has them at real sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kit.kernel_cases import (
    CASES,
    SEPARATE,
    Case,
    check,
    check_nan,
    compare,
    draw,
    into_poison,
    over_implementations,
    poisoned,
)  # fmt: skip


@pytest.mark.parametrize(("case", "implementation"), over_implementations(CASES))
def test_equals_the_definition(case: Case, implementation: str):
    check(case, case.tiny, implementation, "float32", seed=0)


@pytest.mark.parametrize(("case", "implementation"), over_implementations(SEPARATE))
def test_nan_is_seen_and_stays_in_its_row(case: Case, implementation: str):
    check_nan(case, case.tiny, implementation, "float32", seed=0)


def test_outputs_are_written_over_poison():
    x = jnp.arange(4096, dtype=jnp.float32)
    poison = poisoned(x)
    assert np.isnan(poison).all()
    place = poison.unsafe_buffer_pointer()
    out = into_poison(lambda x: x + 1)(poison, x)
    assert out.unsafe_buffer_pointer() == place
    np.testing.assert_array_equal(out, x + 1)


@pytest.mark.parametrize("wrong", [jnp.nan, 1.0], ids=["unwritten", "wrong"])
def test_a_few_numbers_in_a_large_array_are_found(wrong: float):
    right = jnp.ones((1000, 1000)) / 10
    with pytest.raises(AssertionError):
        compare(right.at[3, :4].set(wrong), right, 1e-2)


def test_another_seed_is_other_inputs():
    first, second = (draw(CASES[0], CASES[0].tiny, "float32", seed) for seed in (0, 1))
    assert not jax.tree.all(jax.tree.map(jnp.array_equal, first, second))
