"""What is free is said without hope: by the smallest of what the machine and the container have, rounded down."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.device_memory import committed, free_of_host, gb_free, gb_needed

KB = 1024


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_the_host_has_what_the_machine_has(tmp_path):
    write(tmp_path, "proc/meminfo", "MemTotal:  900 kB\nMemFree: 1 kB\nMemAvailable:   500 kB\n")
    assert free_of_host(tmp_path) == 500 * KB
    write(tmp_path, "sys/fs/cgroup/memory.max", "max\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", "1000\n")
    assert free_of_host(tmp_path) == 500 * KB


def test_a_container_may_have_less(tmp_path):
    write(tmp_path, "proc/meminfo", "MemAvailable:   500 kB\n")
    write(tmp_path, "sys/fs/cgroup/memory.max", f"{300 * KB}\n")
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{100 * KB}\n")
    assert free_of_host(tmp_path) == 200 * KB
    write(tmp_path, "sys/fs/cgroup/memory.current", f"{400 * KB}\n")
    assert free_of_host(tmp_path) == 0


def test_a_machine_that_says_nothing_has_its_memory(tmp_path):
    assert free_of_host(tmp_path) > 0


def test_what_is_needed_rounds_up_and_what_is_free_down():
    assert gb_needed(9_910_000_000) == "10.0 GB"
    assert gb_free(9_990_000_000) == "9.9 GB"


class TestCommitted:
    def test_what_is_not_is_committed(self):
        x = jnp.arange(3)
        tree = committed({"a": x, "b": np.arange(3), "c": None})
        assert tree["a"].committed and not x.committed
        np.testing.assert_array_equal(tree["a"], x)
        assert isinstance(tree["b"], np.ndarray)

    def test_what_is_stays_itself(self):
        tree = committed({"a": jnp.arange(3), "b": np.arange(3)})
        assert committed(tree) is tree
        assert committed(None) is None

    def test_what_is_traced_stays_itself(self):
        @jax.jit
        def same(x):
            tree = [x, jnp.arange(3)]
            assert committed(tree) is tree
            return x

        same(jnp.arange(3))

    def test_what_meets_another_device_may_follow(self):
        here, there = jnp.arange(3), jax.device_put(jnp.arange(3), jax.devices()[1])
        for tree, met in (([here, there], None), ([here], [there]), ([here], there)):
            assert committed(tree, met) is tree
        assert committed([here], [jnp.arange(4)])[0].committed
