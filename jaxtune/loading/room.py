"""Whether a model fits the device, asked before loading: a GPU that is too small should say so at once."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxtune import quant
from jaxtune.device_memory import gb_free, gb_needed, of_device
from jaxtune.errors import DeviceMemoryError
from jaxtune.loading.plan import Leaf, is_quantized, nbytes
from jaxtune.quant import Format, FourBit, Int8, PackedArray, Unpacked

WORKSPACE = 1.5
"""Bytes that packing a weight takes beside it, by the bytes that arrive; see benchmarks/loading.py."""
_CANDIDATES: tuple[tuple[str, Format], ...] = (
    ("load_in_16bit=True", Unpacked()),
    ("load_in_8bit=True", Int8()),
    ("load_in_4bit=True", FourBit()),
)


def require_room(leaves: Sequence[Leaf], device: Any, *, in_flight: int) -> None:
    """Raises `DeviceMemoryError` if the device says how much it has free, and that is less than loading takes."""
    memory = of_device(device)
    if memory is None:
        return
    overhead = int(WORKSPACE * in_flight)
    needed = sum(nbytes(leaf.target) for leaf in leaves) + overhead
    if needed <= memory.free:
        return
    sizes = {option: _size(leaves, format) + overhead for option, format in _CANDIDATES}
    fitting = [f"{option} ({gb_needed(size)})" for option, size in sizes.items() if size <= memory.free]
    raise DeviceMemoryError(
        f"The model's weights need {gb_needed(needed)}, and {device.device_kind} has {gb_free(memory.free)} free "
        f"of {gb_free(memory.limit)}.",
        expected="room for the weights, and beyond them for training: an adapter, its optimizer, activations.",
        fix=f"What fits: {' or '.join(fitting)}."
        if fitting
        else "Nothing of this model fits, not even in 4 bits: free the device, take a larger one, or a smaller model.",
    )


def _size(leaves: Sequence[Leaf], format: Format) -> int:
    """Bytes of the weights if they were packed in this format."""
    total = 0
    for leaf in leaves:
        shape, packed = leaf.target.shape, isinstance(leaf.target, PackedArray)
        dtype = leaf.target.dtype if not packed else "bfloat16"
        whole = jax.ShapeDtypeStruct(shape, dtype)
        total += nbytes(quant.abstract(shape, dtype, format) if is_quantized(leaf.path, shape) else whole)
    return total
