"""What the families' configs say alike: sizes, layer kinds, and rotary embeddings of every kind.

A config is read as transformers gives it (`loading/config.py`): defaults filled in, `rope_parameters` and `layer_types`
in today's spelling, whatever the file's.
"""

import math
from typing import Any

from jaxtune.errors import UnsupportedModelError
from jaxtune.models.config import LayerKind, RopeConfig

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def sizes(hf: dict, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of ModelConfig that every family has; `activation` names the setting that counts."""
    heads = hf["num_attention_heads"]
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim(hf),
        rms_norm_eps=hf["rms_norm_eps"],
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        max_position=hf["max_position_embeddings"],
        activation=_activation(hf, hf[activation]),
    )


def head_dim(hf: dict) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def biases(hf: dict) -> dict[str, Any]:
    """`attention_bias` puts one on q, k, v and o."""
    attention = bool(hf["attention_bias"])
    return dict(qkv_bias=attention, o_bias=attention, mlp_bias=bool(hf.get("mlp_bias", False)))


def alike(hf: dict, window: int | None = None) -> tuple[LayerKind, ...]:
    """Layers of one kind."""
    return (LayerKind(window),) * hf["num_hidden_layers"]


def by_layer_types(hf: dict, *, local_rope: int = 0) -> tuple[LayerKind, ...]:
    """Layers that see everything or a window, as `layer_types` says; those with a window use `ropes[local_rope]`."""
    kinds = {
        "full_attention": LayerKind(),
        "sliding_attention": LayerKind(hf["sliding_window"], local_rope),
    }
    unknown = sorted(set(hf["layer_types"]) - set(kinds))
    if unknown or len(hf["layer_types"]) != hf["num_hidden_layers"]:
        raise UnsupportedModelError(
            f"The config's layer_types are {len(hf['layer_types'])} for {hf['num_hidden_layers']} layers"
            + (f", {', '.join(unknown)} among them." if unknown else "."),
            expected=f"for each layer one of {', '.join(kinds)}.",
            fix="Fetch the model's own config.json again, or use another model of this family.",
        )
    return tuple(kinds[kind] for kind in hf["layer_types"])


def refuse(hf: dict, setting: str) -> None:
    """For a setting that would change the architecture, and that no published model of the family has on."""
    if hf.get(setting):
        raise UnsupportedModelError(
            f"This {hf['model_type']} has {setting}={hf[setting]!r}.",
            expected="a causal model of the plain architecture.",
            fix="Use a model without it.",
        )


def _activation(hf: dict, name: str) -> str:
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"This {hf['model_type']} uses the activation {name!r}.",
            expected=f"{' or '.join(map(repr, ACTIVATIONS))}, as published models do.",
            fix="Use a model of the plain architecture.",
        )
    return ACTIVATIONS[name]


def rope(hf: dict, given: dict | None = None, *, dim: int | None = None) -> RopeConfig:
    """One rotary embedding, from `rope_parameters` or a part of it; `dim` numbers of each head are turned."""
    given = hf["rope_parameters"] if given is None else given
    kind = given.get("rope_type", "default")
    trained = hf["max_position_embeddings"]
    plain: dict[str, Any] = dict(theta=float(given["rope_theta"]), kind=kind, dim=dim)
    match kind:
        case "default":
            return RopeConfig(**plain)
        case "linear":
            return RopeConfig(**plain, factor=float(given["factor"]))
        case "dynamic":
            return RopeConfig(
                **plain, factor=float(given["factor"]), original_max_position=trained, length=trained
            )
    original = int(given.get("original_max_position_embeddings") or trained)
    factor = float(given.get("factor") or trained / original)
    plain |= dict(original_max_position=original, factor=factor)
    match kind:
        case "llama3":
            return RopeConfig(
                **plain,
                low_freq_factor=float(given["low_freq_factor"]),
                high_freq_factor=float(given["high_freq_factor"]),
            )
        case "yarn":
            return RopeConfig(
                **plain,
                attention_factor=_yarn_attention_factor(given, factor),
                beta_fast=float(given.get("beta_fast") or 32),
                beta_slow=float(given.get("beta_slow") or 1),
                truncate=given.get("truncate", True),
            )
        case "longrope":
            attention = given.get("attention_factor")
            if attention is None:
                attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return RopeConfig(
                **plain,
                attention_factor=float(attention),
                short_divisors=tuple(map(float, given["short_factor"])),
                long_divisors=tuple(map(float, given["long_factor"])),
                length=original,
            )
    raise UnsupportedModelError(
        f"This {hf['model_type']} scales its rotary embedding by {kind!r}.",
        expected=f"one of {', '.join(ROPES)}.",
        fix="Use a model with one of those.",
    )


def _yarn_attention_factor(given: dict, factor: float) -> float:
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1)
