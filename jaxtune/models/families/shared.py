"""What the families' configs say alike: sizes, layer kinds, and rotary embeddings of every kind.

A config is read as transformers gives it (`loading/config.py`): defaults filled in, `rope_parameters` and `layer_types`
in today's spelling, whatever the file's.
"""

import math
from typing import Any

from jaxtune.errors import ConfigError, UnsupportedModelError
from jaxtune.models.config import LayerKind, RopeConfig

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def sizes(hf: dict, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of ModelConfig that every family has; `activation` names the setting that counts."""
    heads = count(hf, "num_attention_heads")
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=head_dim(hf),
        rms_norm_eps=hf["rms_norm_eps"],
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        max_position=count(hf, "max_position_embeddings"),
        activation=_activation(hf, hf[activation]),
    )


def head_dim(hf: dict) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // count(hf, "num_attention_heads")


def number(settings: dict, name: str, default: float | None = None) -> float:
    """A setting that has to be a positive number; `default`, if there is one, where the file says nothing."""
    found = settings.get(name)
    if found is None and default is not None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ConfigError(
            f"config: {name} is {found!r}.",
            expected="a positive number.",
            fix=f"Repair {name} in config.json, or download the model again.",
        )
    return float(found)


def count(settings: dict, name: str) -> int:
    """A setting that has to be a whole number of at least 1."""
    return int(number(settings, name))


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
    trained = count(hf, "max_position_embeddings")
    plain: dict[str, Any] = dict(theta=number(given, "rope_theta"), kind=kind, dim=dim)
    match kind:
        case "default":
            return RopeConfig(**plain)
        case "linear":
            return RopeConfig(**plain, factor=number(given, "factor"))
        case "dynamic":
            factor = number(given, "factor")
            return RopeConfig(**plain, factor=factor, original_max_position=trained, length=trained)
    original = int(number(given, "original_max_position_embeddings", trained))
    factor = number(given, "factor", trained / original)
    plain |= dict(original_max_position=original, factor=factor)
    match kind:
        case "llama3":
            return RopeConfig(
                **plain,
                low_freq_factor=number(given, "low_freq_factor"),
                high_freq_factor=number(given, "high_freq_factor"),
            )
        case "yarn":
            return RopeConfig(
                **plain,
                attention_factor=_yarn_attention_factor(given, factor),
                beta_fast=number(given, "beta_fast", 32),
                beta_slow=number(given, "beta_slow", 1),
                truncate=bool(given.get("truncate", True)),
            )
        case "longrope":
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return RopeConfig(
                **plain,
                attention_factor=number(given, "attention_factor", attention),
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
        return number(given, "attention_factor")

    def mscale(weight):
        return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(number(given, "mscale")) / mscale(number(given, "mscale_all_dim"))
    return mscale(1)
