"""Which precision weights are packed in: Unsloth's switches or transformers' `quantization_config`, exactly one; and
which quantised checkpoints are known."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtune.errors import OptionError, UnsupportedModelError, nearest
from jaxtune.quant import Float8, Format, FourBit, Int8, Unpacked

NEVER_PACKED = ("embed_tokens", "lm_head")
CONFIG_NAMES = (
    "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage", "llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight", "quant_method",
)  # fmt: skip
KNOWN_METHODS = ("bitsandbytes", "fp8", "compressed-tensors float-quantized")


def choose_precision(
    *,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool = False,
    load_in_16bit: bool = False,
    load_in_fp8: bool | str = False,
    quantization_config: Any = None,
    full_finetuning: bool = False,
) -> Format | None:
    """The one precision that was asked for; None if none was: the checkpoint's own, or NF4. Weights that are all to be
    trained are not packed."""
    for name, given in (
        ("load_in_4bit", load_in_4bit),
        ("load_in_8bit", load_in_8bit),
        ("load_in_16bit", load_in_16bit),
        ("full_finetuning", full_finetuning),
    ):
        if given not in (True, False, None):
            raise OptionError(f"{name}={given!r}.", expected="True or False.", fix="Pass one of the two.")
    asked: dict[str, Format] = {}
    if full_finetuning:
        asked["full_finetuning=True"] = Unpacked()
    if load_in_4bit:
        asked["load_in_4bit=True"] = FourBit()
    if load_in_8bit:
        asked["load_in_8bit=True"] = Int8()
    if load_in_16bit and not full_finetuning:  # which says the same, only less
        asked["load_in_16bit=True"] = Unpacked()
    if load_in_fp8:
        asked[f"load_in_fp8={load_in_fp8!r}"] = _float8(load_in_fp8)
    if quantization_config is not None:
        asked["quantization_config"] = _from_config(quantization_config)
        if asked["quantization_config"].bits == 4:
            asked.pop("load_in_4bit=True", None)  # likewise
            if load_in_4bit is False:
                asked["load_in_4bit=False"] = Unpacked()
    if len(asked) > 1:
        raise OptionError(
            f"from_pretrained was given {' and '.join(asked)}.",
            expected="one precision.",
            fix="Leave one of them out.",
        )
    if asked:
        return next(iter(asked.values()))
    return Unpacked() if load_in_4bit is False else None


def _float8(value: bool | str) -> Float8:
    if value not in (True, "row", "block"):
        raise OptionError(
            f"load_in_fp8={value!r}.",
            expected='True or "row" (a scale a row), or "block" (one for 128 x 128 weights).',
            fix="Leave load_in_fp8 out for 4 bits.",
        )
    return Float8(128 if value == "block" else None)


def _from_config(config: Any) -> Format:
    """transformers' BitsAndBytesConfig, or a mapping of its names."""

    if isinstance(config, Mapping):
        if unknown := [name for name in config if name not in CONFIG_NAMES]:
            raise OptionError(
                f"quantization_config has {unknown[0]!r}.",
                expected=f"names of BitsAndBytesConfig: {', '.join(CONFIG_NAMES)}.",
                fix=f"Correct it, or leave it out.{nearest(str(unknown[0]), CONFIG_NAMES)}",
            )
    elif not hasattr(config, "load_in_4bit"):
        raise OptionError(
            f"quantization_config={config!r}.",
            expected="a BitsAndBytesConfig, or a dict of its names.",
            fix="Use load_in_fp8 for float8, load_in_8bit or load_in_4bit for the others.",
        )

    def get(name: str, default: Any) -> Any:
        found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        return default if found is None else found

    spared = [name for name in get("llm_int8_skip_modules", ()) if name not in NEVER_PACKED]
    if spared:
        raise OptionError(
            f"quantization_config has llm_int8_skip_modules with {', '.join(map(repr, spared))}.",
            expected=f"at most {' and '.join(NEVER_PACKED)}: every linear of the layers is packed.",
            fix="Leave llm_int8_skip_modules out, or load_in_16bit=True.",
        )
    in_4bit, in_8bit = bool(get("load_in_4bit", False)), bool(get("load_in_8bit", False))
    if in_4bit == in_8bit:
        raise OptionError(
            f"quantization_config has load_in_4bit={in_4bit} and load_in_8bit={in_8bit}.",
            expected="one of the two.",
            fix="Set the one that you mean; for 16 bits pass load_in_16bit=True and no quantization_config.",
        )
    if in_8bit:
        return Int8()
    values = str(get("bnb_4bit_quant_type", "fp4")).lower()
    if values not in ("nf4", "fp4"):
        raise OptionError(
            f"quantization_config has bnb_4bit_quant_type={values!r}.",
            expected="'nf4' or 'fp4', as in bitsandbytes (where 'fp4' is the default).",
            fix="Choose 'nf4'.",
        )
    return FourBit(values, bool(get("bnb_4bit_use_double_quant", False)))


def require_known(hf: Mapping[str, Any], folder: Path) -> None:
    """Refuses, by its config, a checkpoint that was quantised in a way that we cannot read. What a known one holds is
    decided tensor by tensor."""
    quantization = hf.get("quantization_config")
    if not quantization:
        return
    method = quantization.get("quant_method") or str(quantization.get("quant_algo", "")).lower()
    if method == "compressed-tensors":
        method += f" {quantization.get('format')}"
    if method not in KNOWN_METHODS:
        raise UnsupportedModelError(
            f"{folder} holds weights that are quantised already ({method or json.dumps(quantization)}).",
            expected=f"weights in 16 or 32 bits, or quantised by {' or '.join(KNOWN_METHODS)}.",
            fix="Name the original model instead of its quantised copy: load_in_4bit quantises it while it loads.",
        )
    if method == "fp8" and list(quantization.get("weight_block_size") or [128, 128]) != [128, 128]:
        raise UnsupportedModelError(
            f"{folder} holds float8 weights in blocks of {json.dumps(quantization['weight_block_size'])}.",
            expected="blocks of [128, 128], or one scale for a weight or a row.",
            fix="Name the original model instead of its quantised copy.",
        )
