"""The benchmark harness: `time_async` measures, `record` writes down the result with all that it depends on.

Timing is asynchronous and in bulk: many calls are dispatched one after the other and waited for once, as a training
loop does, so that neither dispatch nor the wait for each result is part of the number while the device is the
slower side. Inputs rotate, so that no call finds the last call's operands in the cache.

    rows = [{"size": n, **time_async(jax.jit(op), inputs(n)).as_row()} for n in sizes]
    record("my_op", rows)

Results go to benchmarks/results/<name>.json, or to the folder that JAXTUNE_RESULTS names.
"""

import dataclasses
import datetime
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

    def bulk(calls: int) -> float:
        result = None
        start = time.perf_counter()
        for inputs in itertools.islice(itertools.cycle(inputs_list), calls):
            result = fn(*inputs)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    jax.block_until_ready(inputs_list)
    bulk(warmup)
    seconds = [bulk(iters) for _ in range(repeats)]
    return Timing(
        median=statistics.median(seconds), min=min(seconds), max=max(seconds), iters=iters, repeats=repeats
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
    target = Path(folder or os.environ.get("JAXTUNE_RESULTS") or ROOT / "benchmarks" / "results")
    target.mkdir(parents=True, exist_ok=True)
    path = target / f"{name}.json"
    text = json.dumps({"name": name, **circumstances(), **extra, "rows": list(rows)}, indent=1)
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n")
    partial.replace(path)
    return path


def circumstances() -> dict[str, Any]:
    """What a number depends on: device, driver, versions, source, command, and when."""
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
    }


def command() -> str:
    """The command line that can be repeated in any checkout: the script relative to it, without the interpreter."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    return " ".join(["python", str(shown), *sys.argv[1:]])


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


def output(*arguments: str) -> str | None:
    """What a program prints, or None if it is missing or fails."""
    try:
        return subprocess.run(
            arguments, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
