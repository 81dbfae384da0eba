"""How one weight lies in a checkpoint, decided by the tensors beside it and never by the config: as numbers, in
bitsandbytes' 4 or 8 bits, or in float8 with scales. `decode` turns its tensors into an array on the device; what
bitsandbytes packed stays packed.

    X.weight + X.weight.absmax (.quant_map, .nested_absmax, .nested_quant_map, .quant_state.bitsandbytes__nf4|fp4)
    X.weight int8 + X.SCB (+ X.weight_format)
    X.weight float8 + X.weight_scale_inv [out / 128, in / 128], or X.weight_scale (one for the whole weight, or a row)
    X.weight
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import CheckpointError
from jaxtune.kernels import nf4
from jaxtune.kernels.nf4 import layout
from jaxtune.kernels.scaled import Scaled
from jaxtune.kernels.scaled import dequantize as dequantize_scaled
from jaxtune.loading.checkpoint import Tensors
from jaxtune.quant import FourBit, Int8, Int8Array
from jaxtune.quant.four_bit import ARRAYS

Arrays = dict[str, Any]
"""A weight's tensors by the part they play."""

_STATE = "quant_state.bitsandbytes__"
_SIBLINGS = (
    "weight_format", "input_scale", "output_scale", "k_scale", "v_scale", "weight_scale", "weight_scale_inv", "SCB"
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Plain:
    """Numbers in 16 or 32 bits."""

    format = None

    def decode(self, arrays: Arrays) -> jax.Array:
        return arrays["weight"]


@dataclasses.dataclass(frozen=True)
class Bnb4:
    """bitsandbytes' bytes and scales: only the order of nibbles changes."""

    format: FourBit
    out_in: tuple[int, int]
    dtype: str

    def decode(self, arrays: Arrays) -> Any:
        values = self.format.values
        codes = layout.from_bitsandbytes(arrays["weight"], self.out_in, layout.ZERO_CODES[values])
        by_row = (self.out_in[0], -1) if layout.is_planar(self.out_in) else (-1,)
        packed = nf4.Packed(
            codes, arrays["absmax"].reshape(by_row), arrays.get("nested_absmax"), arrays.get("nested_offset")
        )
        return ARRAYS[values](*packed, out_in=self.out_in, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class Bnb8:
    format: Int8
    out_in: tuple[int, int]
    dtype: str

    def decode(self, arrays: Arrays) -> Any:
        return Int8Array(arrays["weight"], arrays["SCB"].reshape(-1, 1), out_in=self.out_in, dtype=self.dtype)


@dataclasses.dataclass(frozen=True)
class Float8Numbers:
    """Dequantised as it arrives: weight = code * scale, in float32."""

    format = None

    def decode(self, arrays: Arrays) -> jax.Array:
        scales = arrays["scale"].astype(jnp.float32)
        scales = scales.reshape(scales.shape if scales.ndim == 2 else (-1, 1))
        return dequantize_scaled(Scaled(arrays["weight"], scales), dtype=jnp.float32)


Stored = Plain | Bnb4 | Bnb8 | Float8Numbers


@dataclasses.dataclass(frozen=True)
class Source:
    """One weight of the checkpoint: what it is, and which tensors hold it."""

    name: str
    stored: Stored
    tensors: Mapping[str, str]
    """Part -> tensor's name."""
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Parts that are no tensors of their own."""
    has_own_maps: bool = False
    """Whether its value maps differ from ours in their last bits."""

    def read(self, checkpoint: Tensors, rows: slice | None = None) -> Arrays:
        arrays: Arrays = dict(self.constants)
        for part, name in self.tensors.items():
            array = checkpoint.read(name)
            if isinstance(self.stored, Bnb4) and part == "weight":
                array = array.reshape(-1).view(np.uint8)  # whatever bnb_4bit_quant_storage calls these bytes
            arrays[part] = array if rows is None else array[rows]
        return arrays

    def siblings(self) -> set[str]:
        """Every name that tensors beside this weight may have, whether they are needed or not."""
        module = self.name.removesuffix("weight")
        known = {module + sibling for sibling in _SIBLINGS}
        if isinstance(self.stored, Bnb4):
            parts = (
                "absmax",
                "quant_map",
                "nested_absmax",
                "nested_quant_map",
                _STATE + self.stored.format.values,
            )
            known |= {f"{self.name}.{part}" for part in parts}
        return known | set(self.tensors.values())


def recognise(checkpoint: Tensors, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Source:
    """How the weight `name` lies there, checked against the `shape` it must have. `dtype` is what it is used in."""
    if f"{name}.absmax" in checkpoint:
        return _bnb4(checkpoint, name, shape)
    module = name.removesuffix("weight")
    if f"{module}SCB" in checkpoint:
        return _bnb8(checkpoint, name, shape, dtype)
    found = checkpoint.dtype(name)
    _require_shape(checkpoint, name, checkpoint.shape(name), shape)
    if not jnp.issubdtype(found, jnp.floating):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is stored as {found}, without the scales of a format that jaxtune knows.",
            expected="float32, float16, bfloat16, float8 with scales, or bitsandbytes' 4 or 8 bits.",
            fix="Name the original 16-bit model instead of this quantised copy.",
        )
    if found.itemsize > 1:
        return Source(name, Plain(), {"weight": name})
    for scale in (f"{module}weight_scale_inv", f"{module}weight_scale"):
        if scale in checkpoint:
            _require_scales(checkpoint, scale, shape)
            return Source(name, Float8Numbers(), {"weight": name, "scale": scale})
    raise CheckpointError(
        f"{checkpoint.folder}: {name} is stored as {found}, without its scales.",
        expected=f"{module}weight_scale_inv or {module}weight_scale beside it.",
        fix="Download the checkpoint again, or name the original 16-bit model.",
    )


def numbers_shape(checkpoint: Tensors, name: str) -> tuple[int, ...]:
    """A weight's as numbers, whatever lies there; as yet unchecked."""
    if f"{name}.absmax" not in checkpoint:
        return checkpoint.shape(name)
    states = [f"{name}.{_STATE}{values}" for values in ARRAYS]
    state = next((_read_state(checkpoint, each) for each in states if each in checkpoint), {})
    return tuple(state.get("shape") or ())


def _bnb4(checkpoint: Tensors, name: str, shape: tuple[int, ...]) -> Source:
    values = next((each for each in ARRAYS if f"{name}.{_STATE}{each}" in checkpoint), None)
    if values is None or f"{name}.quant_map" not in checkpoint:
        raise _incomplete(checkpoint, name, f"{name}.quant_map and {name}.{_STATE}nf4 or fp4")
    state = _read_state(checkpoint, f"{name}.{_STATE}{values}")
    double = f"{name}.nested_absmax" in checkpoint
    _require_shape(checkpoint, name, tuple(state.get("shape") or ()), shape)
    if state.get("blocksize") != layout.BLOCK or (double and state.get("nested_blocksize") != layout.GROUP):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has scales over {state.get('blocksize')} weights"
            f"{f', and theirs over {state.get("nested_blocksize")}' if double else ''}.",
            expected=f"{layout.BLOCK}{f' and {layout.GROUP}' if double else ''}, as bitsandbytes has them by default.",
            fix="Name the original 16-bit model: load_in_4bit quantises it while it loads.",
        )
    exact = [_compare_map(checkpoint, f"{name}.quant_map", layout.TABLES[values])]
    size = math.prod(shape)
    blocks = -(-size // layout.BLOCK)
    wanted = {"weight": (-(-size // 2), 1), "absmax": (blocks, 1 if double else 4)}
    tensors = {"weight": name, "absmax": f"{name}.absmax"}
    constants: dict[str, np.ndarray] = {}
    if double:
        if f"{name}.nested_quant_map" not in checkpoint or "nested_offset" not in state:
            raise _incomplete(checkpoint, name, f"{name}.nested_quant_map and nested_offset")
        exact.append(_compare_map(checkpoint, f"{name}.nested_quant_map", layout.DYNAMIC_MAP))
        wanted["nested_absmax"] = (-(-blocks // layout.GROUP), 4)
        tensors["nested_absmax"] = f"{name}.nested_absmax"
        constants["nested_offset"] = np.asarray(state["nested_offset"], np.float32)
    for part, (count, itemsize) in wanted.items():
        found = math.prod(checkpoint.shape(tensors[part])) * checkpoint.dtype(tensors[part]).itemsize
        # The last byte of a wider bnb_4bit_quant_storage may be padding.
        if found != count * itemsize and not (part == "weight" and 0 <= found - count < 4):
            raise CheckpointError(
                f"{checkpoint.folder}: {tensors[part]} has {found:,} bytes.",
                expected=f"{count * itemsize:,}, for a weight of shape {shape}.",
                fix="Download the checkpoint again.",
            )
    stored = Bnb4(FourBit(values, double), (shape[0], shape[1]), str(state.get("dtype", "bfloat16")))
    return Source(name, stored, tensors, constants, has_own_maps=not all(exact))


def _bnb8(checkpoint: Tensors, name: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Source:
    module = name.removesuffix("weight")
    _require_shape(checkpoint, name, checkpoint.shape(name), shape)
    layout_name = f"{module}weight_format"
    row_wise = layout_name not in checkpoint or int(checkpoint.read(layout_name)) == 0
    if checkpoint.dtype(name) != np.int8 or checkpoint.shape(f"{module}SCB") != shape[:1] or not row_wise:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is {checkpoint.dtype(name)} with {module}SCB of shape "
            f"{checkpoint.shape(f'{module}SCB')}{'' if row_wise else ', in the order of an old GPU'}.",
            expected="int8, row by row, with one scale a row.",
            fix="Name the original 16-bit model: load_in_8bit quantises it while it loads.",
        )
    stored = Bnb8(Int8(), (shape[0], shape[1]), dtype.name)
    return Source(name, stored, {"weight": name, "SCB": f"{module}SCB"})


def _read_state(checkpoint: Tensors, name: str) -> dict[str, Any]:
    try:
        state = json.loads(checkpoint.read(name).tobytes())
        if isinstance(state, dict):
            return state
        raise ValueError("not an object")
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder}: {name} is no JSON: {error}.",
            expected="the settings that bitsandbytes stores with each weight.",
            fix="Download the checkpoint again.",
        ) from error


def _compare_map(checkpoint: Tensors, name: str, ours: np.ndarray) -> bool:
    """Whether the file's values are the very ones that are built into our programs. Another version of torch may have
    rounded them otherwise; anything beyond that is an error."""
    theirs = checkpoint.read(name).astype(np.float32)
    if theirs.shape != ours.shape or not np.allclose(theirs, ours, rtol=1e-6, atol=1e-9):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} holds other values than bitsandbytes' own.",
            expected=f"its {len(ours)} values.",
            fix="Name the original 16-bit model: load_in_4bit quantises it while it loads.",
        )
    return np.array_equal(theirs, ours)


def _require_shape(checkpoint: Tensors, name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    if tuple(found) != tuple(shape):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has the shape {tuple(found)}.",
            expected=f"{tuple(shape)}, from config.json.",
            fix="Use the config.json that was saved with these weights.",
        )


def _require_scales(checkpoint: Tensors, name: str, shape: tuple[int, ...]) -> None:
    found = checkpoint.shape(name)
    grid = tuple(-(-size // 128) for size in shape)
    if len(shape) != 2 or found not in ((), (1,), (1, 1), grid, shape[:1], (*shape[:1], 1)):
        raise CheckpointError(
            f"{checkpoint.folder}: {name} has the shape {found}, beside a weight of shape {shape}.",
            expected=f"one scale, one a row, or {grid}: one for each 128 x 128 weights.",
            fix="Name the original 16-bit model instead of this float8 copy.",
        )


def _incomplete(checkpoint: Tensors, name: str, missing: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.folder}: {name} has quantised scales beside it, but not all that belongs to them.",
        expected=f"{missing}.",
        fix="Download the checkpoint again.",
    )
