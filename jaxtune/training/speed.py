"""How fast a run is, and what it takes: tokens per second, MFU, the device's memory."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxtune.device_memory import default_device

PEAK_FLOPS = {
    "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "H20": 148e12, "A100": 312e12, "A30": 165e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12, "RTX 5090": 209e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}  # fmt: skip
"""Dense products of bfloat16, accumulated in float32, per second, as NVIDIA states them, by a part of the device's
name. The first that is found counts."""


def peak_flops(device: Any) -> float | None:
    """None where it is not known: MFU is then not said."""
    words = f" {device.device_kind} ".replace("-", " ")
    return next((peak for name, peak in PEAK_FLOPS.items() if f" {name} " in words), None)


def peak_bytes(device: Any) -> int | None:
    """The most memory that was in use at once; None where the backend does not say."""
    stats = device.memory_stats() if hasattr(device, "memory_stats") else None
    return (stats or {}).get("peak_bytes_in_use")


class Meter:
    """Adds to the mean of some steps' records what follows from it."""

    def __init__(self, device: Any = None):
        self.device = default_device() if device is None else device
        self.peak_flops = peak_flops(self.device)

    def read(self, record: dict[str, Any]) -> dict[str, Any]:
        """`useful_flops`, where a trainer counts them, become `mfu`."""
        seconds, flops = record["step_time_sec"], record.pop("useful_flops", None)
        record["tokens_per_second"] = record["tokens"] / seconds
        if flops is not None and self.peak_flops is not None:
            record["mfu"] = flops / seconds / self.peak_flops
        if (most := peak_bytes(self.device)) is not None:
            record["peak_device_bytes"] = most
        return record


def in_words(record: Mapping[str, Any]) -> list[str]:
    """The same, short enough to stand beside a progress bar."""
    said = [f"{record['tokens_per_second']:.0f} tokens/s"]
    if "mfu" in record:
        said.append(f"MFU {record['mfu']:.0%}")
    if "peak_device_bytes" in record:
        said.append(f"{record['peak_device_bytes'] / 1e9:.1f} GB")
    return said


def sample_lengths(segment_ids: np.ndarray | jax.Array) -> list[int]:
    """Tokens of each sample of a batch, [A, R, L]; 0 is padding."""
    rows = np.asarray(segment_ids).reshape(-1, segment_ids.shape[-1])
    return [int(n) for row in rows for n in np.bincount(row)[1:] if n]
