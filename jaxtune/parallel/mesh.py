"""The device mesh: (data, fsdp, tensor). One GPU is the 1 x 1 x 1 mesh of the same program."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from jaxtune.errors import ShardingError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over the first data * fsdp * tensor devices. `data` replicates weights, `fsdp` cuts them and gathers them
    for use, `tensor` cuts the products themselves."""
    devices = jax.devices() if devices is None else devices
    needed = data * fsdp * tensor
    if min(data, fsdp, tensor) < 1 or needed > len(devices):
        raise ShardingError(
            f"A mesh of data={data}, fsdp={fsdp}, tensor={tensor} was asked for, on {len(devices)} devices.",
            expected="axes of at least 1 whose product is at most the number of devices.",
            fix="Choose smaller axes.",
        )
    return jax.make_mesh((data, fsdp, tensor), AXES, (AxisType.Auto,) * 3, devices=devices[:needed])
