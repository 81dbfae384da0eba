"""What the machine's GPU can do; asked before anything of Pallas is imported."""

import jax


def capability() -> float:
    """The compute capability of the GPU that is computed on; 0 without one."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    return float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0


def why_not_mosaic() -> str | None:
    """What keeps kernels in Pallas' Mosaic GPU from running on this machine, if anything does."""
    if not 9.0 <= capability() < 10.0:
        return "it was checked on NVIDIA GPUs of compute capability 9.0 only"
    if jax.device_count() == 1 or jax.sharding.get_abstract_mesh().are_all_axes_manual:
        return None
    return "among several devices, arrays may be cut into shards; under jax.shard_map they are whole"
