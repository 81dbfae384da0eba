"""The benchmark harness: its clock covers the work, its files say what the numbers depend on."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import harness


def test_seconds_are_per_call_and_ordered():
    timing = harness.time_async(lambda: time.sleep(0.005), [()], iters=4, warmup=1, repeats=3)
    assert 0.005 <= timing.min <= timing.median <= timing.max < 0.5
    assert timing.as_row()["us"] == timing.median * 1e6


def test_inputs_take_turns_and_warmup_is_not_counted():
    seen = []

    def step(x: jax.Array) -> jax.Array:
        seen.append(int(x))
        return x

    harness.time_async(step, [(jnp.asarray(i),) for i in range(3)], iters=4, warmup=2, repeats=2)
    assert seen == [0, 1] + [0, 1, 2, 0] * 2


def test_the_wait_is_part_of_the_time():
    """A dispatch returns at once; the clock must stop only when the work is done."""
    x = jnp.ones((700, 700))
    work = jax.jit(lambda x: jax.lax.fori_loop(0, 10, lambda _, y: y @ x, x))
    jax.block_until_ready(work(x))
    start = time.perf_counter()
    jax.block_until_ready(work(x))
    once = time.perf_counter() - start
    assert harness.time_async(work, [(x,)], iters=2, warmup=1, repeats=3).max > once / 5


@pytest.mark.parametrize("nothing", [{"iters": 0}, {"warmup": 0}, {"repeats": 0}])
def test_nothing_to_time_is_an_error(nothing: dict[str, int]):
    with pytest.raises(ValueError, match="at least 1"):
        harness.time_async(lambda: None, [()], **nothing)


def test_no_inputs_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        harness.time_async(lambda: None, [])


def test_record_says_what_the_numbers_depend_on(tmp_path: Path):
    path = harness.record("op", [{"size": 8, "us": 1.5}], folder=tmp_path / "new", model="llama")
    result = json.loads(path.read_text())
    assert path == tmp_path / "new" / "op.json"
    assert result["rows"] == [{"size": 8, "us": 1.5}]
    assert result["model"] == "llama"
    assert result["platform"] == jax.default_backend()
    assert result["device_count"] == jax.device_count()
    assert result["versions"]["jax"] == jax.__version__
    assert {"date", "command", "device", "driver", "python", "commit", "dirty", "kernels"} <= result.keys()
    assert list(path.parent.iterdir()) == [path]


def test_folder_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXTUNE_RESULTS", str(tmp_path))
    assert harness.record("op", []) == tmp_path / "op.json"


def test_command_names_no_folder_of_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", [str(harness.ROOT / "benchmarks" / "op.py"), "--size", "8"])
    assert harness.command() == "python benchmarks/op.py --size 8"
    monkeypatch.setattr("sys.argv", ["/somewhere/else/tool.py"])
    assert harness.command() == "python tool.py"


def test_commit_without_git_is_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert harness.source() == {"commit": None, "dirty": None}
    assert harness.driver() is None


def test_what_is_timed_by_turns_takes_turns():
    seen = []
    functions = {name: lambda name=name: (seen.append(name), time.sleep(0.001)) for name in "ab"}
    timings = harness.time_by_turns(functions, seconds=0.01, repeats=3)
    bulks = [name for name, before in zip(seen, [None, *seen], strict=False) if name != before]
    assert bulks == ["a", "b"] * 4
    assert all(0.001 <= timing.median < 0.1 and timing.repeats == 3 for timing in timings.values())


def test_the_hash_follows_names_and_contents_of_kernels(tmp_path: Path):
    def after(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return harness.kernels(tmp_path)

    hashes = [
        after("op/api.py", "1"),
        after("op/api.py", "2"),
        after("op/tiles.json", "{}"),
        after("op/b.py", ""),
    ]
    assert len(set(hashes)) == 4
    assert after("op/notes.md", "not a source") == hashes[-1]
    (tmp_path / "op/b.py").rename(tmp_path / "op/c.py")
    assert harness.kernels(tmp_path) not in hashes


def test_a_module_is_run_by_its_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/pytest/__main__.py", "-m", "gpu"])
    assert harness.command() == "python -m pytest -m gpu"
