"""Rounding by chance: what nearest rounding loses adds up."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.training.rounding import add_rounded

START = {"w": jnp.array([0.02, -0.02, 1.0, -3.0], jnp.bfloat16)[:, None].repeat(4096, 1)}
STEP = jax.tree.map(lambda w: jnp.full(w.shape, 1e-5), START)


def test_small_steps_add_up():
    w = START
    for i in range(20):
        w = add_rounded(w, STEP, jax.random.key(i))
    moved = (w["w"].astype(jnp.float32) - START["w"].astype(jnp.float32)).mean(1)
    nearest = (START["w"].astype(jnp.float32) + STEP["w"]).astype(jnp.bfloat16)
    assert jnp.array_equal(nearest, START["w"]), "or there would be nothing to mend"
    np.testing.assert_allclose(moved[:2], 2e-4, rtol=0.05)
    np.testing.assert_allclose(moved[2:], 2e-4, atol=2e-4)


def test_a_sum_goes_to_one_of_its_neighbours():
    total = START["w"].astype(jnp.float32) + STEP["w"]
    rounded = add_rounded(START, STEP, jax.random.key(0))["w"].astype(jnp.float32)
    ulp = jnp.spacing(START["w"]).astype(jnp.float32)
    assert (jnp.abs(rounded - total) < jnp.abs(ulp)).all()
    assert len(np.unique(rounded[0])) == 2


def test_what_has_a_value_keeps_it():
    nothing = jax.tree.map(jnp.zeros_like, STEP)
    assert jnp.array_equal(add_rounded(START, nothing, jax.random.key(0))["w"], START["w"])
    huge = {"w": jnp.array([jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)}
    kept = add_rounded(huge, {"w": jnp.zeros(3)}, jax.random.key(0))["w"]
    np.testing.assert_array_equal(kept.astype(jnp.float32), [np.inf, -np.inf, np.nan])


def test_float32_is_rounded_to_the_nearest():
    exact = {"w": jnp.float32(1) + jnp.arange(8, dtype=jnp.float32)}
    step = {"w": jnp.full(8, 1e-5)}
    assert jnp.array_equal(add_rounded(exact, step, jax.random.key(0))["w"], exact["w"] + step["w"])
