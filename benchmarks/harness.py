"""The benchmark harness: `time_async` measures, `record` writes down the result with all that it depends on.

Timing is asynchronous and in bulk: many calls are dispatched one after the other and waited for once, as a training
loop does, so that neither dispatch nor the wait for each result is part of the number while the device is the
slower side. Inputs rotate, so that no call finds the last call's operands in the cache.

    rows = [{"size": n, **time_async(jax.jit(op), inputs(n)).as_row()} for n in sizes]
    record("my_op", rows)

What is compared with something else is timed by turns (`time_by_turns`): a GPU at its power limit is slower than a cool
one, so both have to meet the same clock.

Results go to benchmarks/results/<name>.json, or to the folder that JAXTUNE_RESULTS names.
"""

import dataclasses
import datetime
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "numpy", "torch")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds per call, over several repetitions of the same bulk of calls."""

    median: float
    min: float
    max: float
    iters: int
    """Calls in one bulk."""
    repeats: int

    def as_row(self) -> dict[str, float]:
        """Microseconds under the names that the result files use."""
        return {"us": self.median * 1e6, "us_min": self.min * 1e6, "us_max": self.max * 1e6}


def time_async(
    fn: Callable[..., Any],
    inputs_list: Sequence[Sequence[Any]],
    *,
    iters: int = 50,
    warmup: int = 3,
    repeats: int = 5,
) -> Timing:
    """Times `fn(*inputs)` over inputs that take turns; `fn` is jitted and donates nothing.

    Args:
        fn: Returns arrays; waiting for the last call's means waiting for all of them, since a device runs in order.
        inputs_list: Argument tuples of equal shapes. Together they should be larger than the device's cache.
        iters: Calls dispatched before waiting once.
        warmup: Calls before the clock starts: at least one, which compiles.
        repeats: Bulks timed, for the spread.
    """
    if min(len(inputs_list), iters, warmup, repeats) < 1:
        raise ValueError("inputs_list, iters, warmup and repeats must each be at least 1")

    jax.block_until_ready(inputs_list)
    _bulk(fn, inputs_list, warmup)
    return _timing([_bulk(fn, inputs_list, iters) for _ in range(repeats)], iters)


def time_by_turns(
    functions: Mapping[str, Callable[[], Any]], *, seconds: float, repeats: int = 7
) -> dict[str, Timing]:
    """Times functions without arguments whose bulks take turns, so that all meet the same clock and heat. Each gets so
    many `seconds` in all, as far as whole calls allow."""
    iters = {}
    for name, fn in functions.items():
        _bulk(fn, [()], 1)
        iters[name] = max(1, min(1000, round(seconds / repeats / _bulk(fn, [()], 2))))
    rounds = [{name: _bulk(fn, [()], iters[name]) for name, fn in functions.items()} for _ in range(repeats)]
    return {name: _timing([each[name] for each in rounds], iters[name]) for name in functions}


def _bulk(fn: Callable[..., Any], inputs_list: Sequence[Sequence[Any]], calls: int) -> float:
    """Seconds per call: all dispatched, then one wait."""
    result = None
    start = time.perf_counter()
    for inputs in itertools.islice(itertools.cycle(inputs_list), calls):
        result = fn(*inputs)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _timing(seconds: Sequence[float], iters: int) -> Timing:
    return Timing(
        median=statistics.median(seconds),
        min=min(seconds),
        max=max(seconds),
        iters=iters,
        repeats=len(seconds),
    )


def record(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    folder: str | os.PathLike[str] | None = None,
    **extra: Any,
) -> Path:
    """Writes rows and circumstances to `<folder>/<name>.json` and returns that path.

    Args:
        name: Names the file; a second result of the same name replaces the first.
        rows: One mapping per measurement, of plain numbers and strings.
        folder: Where to write instead of JAXTUNE_RESULTS or benchmarks/results.
        **extra: Further circumstances, written beside the others.
    """
    path = result_path(name, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": name, **circumstances(), **extra, "rows": list(rows)}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    return path


def result_path(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """Where the result of this name lies, or would."""
    return Path(folder or os.environ.get("JAXTUNE_RESULTS") or RESULTS) / f"{name}.json"


def circumstances() -> dict[str, Any]:
    """What a number depends on: device, driver, versions, source, kernels, command, and when."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
        "device": device.device_kind,
        "device_count": jax.device_count(),
        "platform": device.platform,
        "driver": driver(),
        "python": platform.python_version(),
        "versions": versions(),
        **source(),
        "kernels": kernels(),
    }


def command() -> str:
    """The command line that can be repeated in any checkout: the script relative to it, without the interpreter."""
    script = Path(sys.argv[0]).resolve()
    if script.name == "__main__.py":
        shown = f"-m {script.parent.name}"
    else:
        shown = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    return " ".join(["python", shown, *sys.argv[1:]])


def driver() -> str | None:
    """NVIDIA's driver version, or None where there is no such driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    versions = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def source() -> dict[str, Any]:
    """The commit, and whether anything but results differs from it. None where there is no git, as on a machine that
    was handed only the files (there JAXTUNE_COMMIT may name it)."""
    commit = output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return {"commit": os.environ.get("JAXTUNE_COMMIT"), "dirty": None}
    changes = output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit, "dirty": bool(changes)}


def kernels(root: Path = ROOT / "jaxtune" / "kernels") -> str:
    """A hash of the sources of all kernels and of their tuned settings, names and contents: what a run on a GPU has
    checked, and until which change."""
    digest = hashlib.sha256()
    for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(root).as_posix()}\n{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def output(*arguments: str) -> str | None:
    """What a program prints, or None if it is missing or fails."""
    try:
        return subprocess.run(
            arguments, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
