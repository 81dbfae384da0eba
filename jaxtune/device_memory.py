"""What a device and its host have free, and how to say it."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax


class Memory(NamedTuple):
    """Bytes of a device that says what it has; a CPU does not."""

    free: int
    limit: int


def default_device() -> Any:
    return jax.config.jax_default_device or jax.local_devices()[0]


def of_device(device: Any) -> Memory | None:
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    if not stats or "bytes_limit" not in stats:
        return None
    return Memory(stats["bytes_limit"] - stats.get("bytes_in_use", 0), stats["bytes_limit"])


def free_of_host(root: Path = Path("/")) -> int:
    """Bytes that can be had without swapping, by what the machine has and what this process' container may take."""
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        most, now = (
            int((root / "sys/fs/cgroup" / f"memory.{name}").read_text()) for name in ("max", "current")
        )
        free.append(most - now)
    return max(0, min(free))


PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
"""The environment variable that says, when Python starts, how much of the host's memory XLA pins at most."""


def pinned_limit() -> int:
    """Bytes of the host's memory that a GPU's programs can have."""
    return int(float(os.environ.get(PINNED_LIMIT, 64)) * 2**30)


def raise_limit(needed: int) -> str:
    """What to do where the host has that much memory, and XLA would not pin it."""
    gib = math.ceil(needed / 2**30)
    return f"Start Python with {PINNED_LIMIT}={gib} in its environment: the host has that much memory."


def is_on_host(x: jax.Array) -> bool:
    """Whether an array, or one that is traced, lies in the host's memory, for a device to read."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Host)


def on_device(x: jax.Array) -> jax.Array:
    return jax.device_put(x, jax.memory.Space.Device)


def committed(tree: Any, met: Any = None) -> Any:
    """The same arrays, committed to the one device that they and those that they meet in programs are on.

    A program's results are committed if any of its arguments is, and for the compilation cache programs of committed
    arrays are others than those of uncommitted ones. Arrays on several devices, or traced, are left as they are."""
    arrays, others = ([x for x in jax.tree.leaves(each) if isinstance(x, jax.Array)] for each in (tree, met))
    if any(isinstance(x, jax.core.Tracer) for x in arrays + others) or all(x.committed for x in arrays):
        return tree
    if len(set().union(*(x.sharding.device_set for x in arrays + others))) != 1:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding) if isinstance(x, jax.Array) else x, tree)


def beside(x: jax.Array, other: jax.Array) -> jax.Array:
    """x in the memory that `other` lies in."""
    return on_host(x) if is_on_host(other) else x


def gb_needed(size: int) -> str:
    return f"{math.ceil(size / 1e8) / 10:.1f} GB"


def gb_free(size: int) -> str:
    """Rounded down, so that what is free never looks like enough when it is not."""
    return f"{math.floor(size / 1e8) / 10:.1f} GB"
