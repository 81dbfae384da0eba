"""A model's packed arrays as a bitsandbytes checkpoint: the folder that transformers' `from_pretrained` loads in 4 bits
(or int8) without quantising anything again. Codes and scales are written as they are; only nibbles change places.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxtune.errors import UnsupportedModelError
from jaxtune.export.hf_folder import parse_size, split, write_model
from jaxtune.export.safetensors_stream import Entry
from jaxtune.export.verify.packed import verify_packed
from jaxtune.export.weights import Weight, weights
from jaxtune.kernels.nf4 import layout
from jaxtune.loading.checkpoint import Tensors
from jaxtune.models.causal_lm import CausalLM, Params
from jaxtune.quant import Format, FourBit, FourBitArray, Int8Array, PackedArray

Sources = dict[str, tuple[Entry, Callable[[], np.ndarray]]]
"""Name -> what the header says of it, and what gives it."""


def save_bnb(
    folder: str | Path,
    base: Path,
    model: CausalLM,
    params: Params,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    record: Mapping[str, Any] = MappingProxyType({}),
    quantised_from: Tensors | None = None,
    verify: bool = True,
) -> None:
    """Writes `params` as they are, with the settings and the tokenizer of `base`, the folder that they came from.
    `record` says what they were quantised from, if that is known; their values are compared with `quantised_from`, if
    that is at hand."""
    limit = parse_size(max_shard_size)
    formats: set[Format] = set()
    kept: list[str] = []
    tensors: Sources = {}
    for name, weight in weights(model.config, params):
        tensors |= {entry.name: (entry, read) for entry, read in _tensors(name, weight)}
        if isinstance(weight.leaf, PackedArray):
            formats.add(weight.leaf.format)
        elif name.startswith("model.layers.") and len(weight.shape) == 2:
            kept.append(name.removesuffix(".weight"))
    dtype = np.dtype(params["norm"]["weight"].dtype)
    write_model(
        folder,
        base,
        model.config,
        split((entry for entry, _ in tensors.values()), limit),
        lambda name: tensors[name][1](),
        dtype=dtype,
        tokenizer=tokenizer,
        quantization_config={**quantization_config(formats, dtype, kept), **record},
        check=(lambda stage: verify_packed(stage, model, params, quantised_from)) if verify else None,
    )


def quantization_config(formats: set[Format], dtype: np.dtype, kept: list[str]) -> dict[str, Any]:
    """What transformers reads. `kept` are linears of the layers that are not packed."""
    if len(formats) != 1:
        found = " and ".join(sorted(format.name for format in formats)) or "no packed weights"
        raise UnsupportedModelError(
            f"The model holds {found}.",
            expected="packed weights of one kind: that is what a bitsandbytes checkpoint can hold.",
            fix="Save it with save_pretrained_merged, in 16 bits.",
        )
    (format,) = formats
    four = format if isinstance(format, FourBit) else None
    return {
        "_load_in_4bit": four is not None,
        "_load_in_8bit": four is None,
        "bnb_4bit_compute_dtype": dtype.name,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four.values if four else "fp4",
        "bnb_4bit_use_double_quant": four.double if four else False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # A list replaces transformers' own choice, which is the head.
        "llm_int8_skip_modules": ["lm_head", *kept] if kept else None,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four is not None,
        "load_in_8bit": four is None,
        "quant_method": "bitsandbytes",
    }


def _tensors(name: str, weight: Weight) -> Iterator[tuple[Entry, Callable[[], np.ndarray]]]:
    """The tensors of one weight, each with what fetches it to the host when it is written."""
    leaf, one = weight.leaf, weight.fetch
    if isinstance(leaf, FourBitArray):
        yield from _four_bit(name, leaf, one)
    elif isinstance(leaf, Int8Array):
        module = name.removesuffix("weight")
        yield Entry(name, leaf.out_in, np.dtype(np.int8)), lambda: np.asarray(one().codes)
        yield Entry(f"{module}SCB", leaf.out_in[:1], np.dtype(np.float32)), lambda: np.asarray(one().scales)
        yield Entry(f"{module}weight_format", (), np.dtype(np.uint8)), lambda: np.zeros((), np.uint8)
    elif isinstance(leaf, PackedArray):
        raise UnsupportedModelError(
            f"{name} is held in {leaf.format.name}.",
            expected="4 bits or int8, which is what bitsandbytes has.",
            fix="Load the model with load_in_4bit or load_in_8bit.",
        )
    else:
        yield Entry(name, weight.shape, np.dtype(leaf.dtype)), lambda: np.asarray(one())


def _four_bit(
    name: str, leaf: FourBitArray, one: Callable[[], Any]
) -> Iterator[tuple[Entry, Callable[[], np.ndarray]]]:
    out, inn = leaf.out_in
    blocks = -(-out * inn // layout.BLOCK)
    state: dict[str, Any] = {
        "quant_type": leaf.values,
        "blocksize": layout.BLOCK,
        "dtype": leaf.dtype,
        "shape": [out, inn],
    }

    def entry(part: str, shape: tuple[int, ...], dtype: Any) -> Entry:
        return Entry(f"{name}{part}", shape, np.dtype(dtype))

    yield (
        entry("", (-(-out * inn // 2), 1), np.uint8),
        lambda: np.asarray(layout.to_bitsandbytes(one().codes, leaf.out_in)),
    )
    yield entry(".absmax", (blocks,), leaf.absmax.dtype), lambda: np.asarray(one().absmax)
    yield entry(".quant_map", (16,), np.float32), lambda: layout.TABLES[leaf.values]
    if leaf.nested_absmax is not None:
        groups = -(-blocks // layout.GROUP)
        yield entry(".nested_absmax", (groups,), np.float32), lambda: np.asarray(one().nested_absmax)
        yield entry(".nested_quant_map", (256,), np.float32), lambda: layout.DYNAMIC_MAP
        # The offset lies in the JSON, whose length the header says: it is needed now.
        state |= {
            "nested_blocksize": layout.GROUP,
            "nested_dtype": "float32",
            "nested_offset": float(one().offset),
        }
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    yield entry(f".quant_state.bitsandbytes__{leaf.values}", text.shape, np.uint8), lambda: text
