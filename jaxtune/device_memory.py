"""What a device and its host have free, and how to say it."""

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


def free_of_host() -> int:
    """Bytes that can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gb(size: int) -> str:
    return f"{math.ceil(size / 1e8) / 10:.1f} GB"
