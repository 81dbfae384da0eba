"""A merged model as a compressed-tensors checkpoint, which vLLM and transformers read: the linears of the layers in
float8 or in integers with scales, everything else as the merge has it.

    X.weight float8 [out, in] + X.weight_scale [out, 1]
    X.weight_packed int32 [out, in * bits / 32] + X.weight_scale [out, 1 or in / 128] + X.weight_shape int64 [2]

Each weight is rounded to the nearest code in float32, by the scale as it is stored, in the weight's own dtype.
llm-compressor takes the same scales, but divides in that dtype, which moves some codes by one.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import UnsupportedModelError
from jaxtune.export.hf_folder import parse_size, split, write_model
from jaxtune.export.merge import EMBEDDING_WEIGHT, MergedCheckpoint, Trained
from jaxtune.export.original import record_of
from jaxtune.export.safetensors_stream import Entry
from jaxtune.export.verify.compressed import verify_compressed
from jaxtune.log import counted, get_logger

log = get_logger(__name__)

VERSION = "0.20.0"
"""Of compressed-tensors, whose settings these are."""
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_CHUNK = 1 << 18
"""Weights that are rounded at once, whole rows: few enough for the temporaries to stay in a cache."""

Tensors = dict[str, tuple[Entry, Callable[[], np.ndarray]]]
"""Name -> what the header says of it, and what gives it."""


class Scheme(NamedTuple):
    """How linears are written; symmetric, so that code 0 is 0."""

    bits: int
    is_float: bool = False
    group: int | None = None
    """Weights of a row that share a scale; None is the whole row."""

    @property
    def format(self) -> str:
        return "float-quantized" if self.is_float else "pack-quantized"

    @property
    def codes(self) -> tuple[float, float]:
        """The least and the largest."""
        return (-448.0, 448.0) if self.is_float else (-(2.0 ** (self.bits - 1)), 2.0 ** (self.bits - 1) - 1)

    def holds(self, shape: tuple[int, ...]) -> bool:
        return shape[1] % (self.group or 1) == 0


SCHEMES = {
    "fp8_dynamic": Scheme(8, is_float=True),
    "w8a16": Scheme(8),
    "w4a16": Scheme(4, group=128),
}
"""By the names that llm-compressor gave them. The activations of fp8_dynamic are rounded to float8 as well, as they
come, with a scale a token; those of the others stay in 16 bits."""


def save_compressed(
    folder: str | Path,
    trained: Trained,
    *,
    scheme: str,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
) -> None:
    """`scheme` is one of SCHEMES."""
    limit = parse_size(max_shard_size)
    chosen = SCHEMES[scheme]
    with trained.open() as checkpoint:
        merged = MergedCheckpoint.of(checkpoint, trained)
        linears = [name for name in merged.names if _is_linear(name, merged.shape(name))]
        spared = [name for name in linears if not chosen.holds(merged.shape(name))]
        _report_spared(scheme, merged, spared, len(linears))
        packed = set(linears) - set(spared)
        tensors: Tensors = {}
        for name in merged.names:
            tensors |= _parts(merged, name, chosen) if name in packed else _whole(merged, name)
        settings = quantization_config(chosen, [name.removesuffix(".weight") for name in spared])
        write_model(
            folder,
            trained.base,
            merged.settings(trained.config),
            split((entry for entry, _ in tensors.values()), limit),
            lambda name: tensors[name][1](),
            dtype=merged.dtype(EMBEDDING_WEIGHT),
            tokenizer=tokenizer,
            quantization_config=settings | record_of(trained),
            check=(lambda stage: verify_compressed(stage, chosen.bits, sorted(packed), merged))
            if verify
            else None,
        )


def quantization_config(scheme: Scheme, spared: list[str]) -> dict[str, Any]:
    """`spared` are linears of the layers that stay in 16 bits; the head does anyway."""
    alike = {"num_bits": scheme.bits, "type": "float" if scheme.is_float else "int", "symmetric": True}
    strategy = {"strategy": "group" if scheme.group else "channel", "group_size": scheme.group}
    activations = {**alike, "strategy": "token", "dynamic": True} if scheme.is_float else None
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "quantization_status": "compressed",
        "format": scheme.format,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**alike, **strategy, "dynamic": False},
                "input_activations": activations,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head", *spared],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scales_of(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[out, in] -> [out, 1 or in / group], in the weight's dtype. Both ends of the codes count: in 8 bits, the largest
    weight is 127.5 scales. Zeros alone get a scale that divides them."""
    least, largest = scheme.codes
    numbers = _grouped(weight, scheme).astype(np.float32)
    peaks = np.maximum(numbers.max(axis=-1), -numbers.min(axis=-1))
    scales = (peaks / np.float32((largest - least) / 2)).astype(weight.dtype)
    return np.where(scales == 0, ml_dtypes.finfo(weight.dtype).eps, scales)


def codes_of(weight: np.ndarray, scales: np.ndarray, scheme: Scheme) -> np.ndarray:
    """The nearest ones, halves to even: float8 or int8 [out, in]."""
    ratios = _grouped(weight, scheme).astype(np.float32) / scales.astype(np.float32)[..., None]
    np.clip(ratios, *scheme.codes, out=ratios)
    codes = ratios.astype(_FLOAT8) if scheme.is_float else np.rint(ratios, out=ratios).astype(np.int8)
    return codes.reshape(weight.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """int8 [out, in] -> int32 [out, ceil(in * bits / 32)]: from the lowest bit up, counted from the least code."""
    unsigned = (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    missing = -codes.shape[1] % (32 // bits)
    unsigned = np.pad(unsigned, ((0, 0), (0, missing)))
    if bits == 4:
        unsigned = unsigned[:, 0::2] | unsigned[:, 1::2] << 4
    return np.ascontiguousarray(unsigned).view("<i4")


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("model.layers.") and name.endswith(".weight") and len(shape) == 2


def _report_spared(scheme: str, merged: MergedCheckpoint, spared: list[str], linears: int) -> None:
    if not spared:
        return
    group, widths = SCHEMES[scheme].group, sorted({merged.shape(name)[1] for name in spared})
    said = f"groups of {group} do not fill rows of {' or '.join(map(str, widths))}"
    if len(spared) == linears:
        raise UnsupportedModelError(
            f"save_method={scheme!r}: {said}, and the model has no others.",
            expected=f"rows of a multiple of {group}.",
            fix="Use save_method='w8a16' or 'fp8_dynamic', which have a scale for each row.",
        )
    log.info("%s of %d stay in 16 bits: %s.", counted(len(spared), "linear"), linears, said)


def _whole(merged: MergedCheckpoint, name: str) -> Tensors:
    return {name: (Entry(name, merged.shape(name), merged.dtype(name)), functools.partial(merged.read, name))}


def _parts(merged: MergedCheckpoint, name: str, scheme: Scheme) -> Tensors:
    """The tensors of a linear. Its scales are wanted first, all of a file's linears', so it is merged twice:
    whole codes need not wait for them in memory."""
    out, inn = merged.shape(name)
    module = name.removesuffix("weight")
    dtype = merged.dtype(name)

    def scales() -> np.ndarray:
        return _by_rows(lambda rows: scales_of(rows, scheme), merged.read(name))

    def codes() -> np.ndarray:
        return _by_rows(lambda rows: codes_of(rows, scales_of(rows, scheme), scheme), merged.read(name))

    def packed() -> np.ndarray:
        return pack(codes(), scheme.bits)

    parts = [(Entry(f"{module}weight_scale", (out, inn // (scheme.group or inn)), dtype), scales)]
    if scheme.is_float:
        parts.append((Entry(name, (out, inn), _FLOAT8), codes))
    else:
        words = -(-inn * scheme.bits // 32)
        parts.append((Entry(f"{module}weight_packed", (out, words), np.dtype(np.int32)), packed))
        parts.append((Entry(f"{module}weight_shape", (2,), np.dtype(np.int64)), lambda: np.array([out, inn])))
    return {entry.name: (entry, read) for entry, read in parts}


def _grouped(weight: np.ndarray, scheme: Scheme) -> np.ndarray:
    """[out, in] -> [out, groups, weights that share a scale]"""
    out, inn = weight.shape
    return weight.reshape(out, -1, scheme.group or inn)


def _by_rows(of: Callable[[np.ndarray], np.ndarray], weight: np.ndarray) -> np.ndarray:
    step = max(1, _CHUNK // weight.shape[1])
    return np.concatenate([of(weight[start : start + step]) for start in range(0, len(weight), step)])
