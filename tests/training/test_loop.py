"""The times that the loop says, of steps whose dispatch comes back at once, and of steps that it waits for."""

import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.training import loop

STEP, COMPILING = 0.2, 0.5


class Late:
    """A number that a device has computed at some time, as `jax.device_get` and the loop ask for it."""

    def __init__(self, at):
        self.at = at

    def block_until_ready(self):
        time.sleep(max(0.0, self.at - time.perf_counter()))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.asarray(1.0, dtype)


@pytest.mark.parametrize(("dispatch_waits", "early"), [(False, 0), (True, 0), (True, STEP / 5)])
def test_each_step_has_its_own_time_and_compiling_is_apart(dispatch_waits, early, monkeypatch):
    """`early`: by so much, dispatching does not wait for the end."""
    monkeypatch.setattr(loop.jax, "device_get", lambda tree: {k: np.asarray(v) for k, v in tree.items()})
    done = [0.0]

    def step(state, frozen, batch):
        done[0] = max(done[0], time.perf_counter()) + STEP  # the device takes one after the other
        if dispatch_waits:
            time.sleep(max(0.0, done[0] - time.perf_counter() - early))
        return state, {"loss": Late(done[0]), "grad_norm": Late(done[0])}

    batches = [({"tokens": jnp.zeros((1, 1, 4))}, {"epoch": 1.0})] * 4
    records = []
    state = types.SimpleNamespace(step=0)
    loop.run(step, state, None, batches, records.append, prepare=lambda *_: time.sleep(COMPILING))
    np.testing.assert_allclose([record["step_time_sec"] for record in records], STEP, atol=STEP / 2)
    assert COMPILING <= records[0]["compile_seconds"] < COMPILING + STEP / 2
    assert all("compile_seconds" not in record for record in records[1:])
