"""Llama 1 to 3.3, and what shares its architecture: TinyLlama, Yi, SmolLM2, DeepSeek-R1's Llama distillations."""

from jaxtune.errors import UnsupportedModelError
from jaxtune.models.config import ModelConfig, RopeConfig

MODEL_TYPE = "llama"


def from_hf(hf: dict) -> ModelConfig:
    """A `LlamaConfig` as a dict, with transformers' defaults filled in -> ModelConfig."""
    if hf["hidden_act"] != "silu":
        raise UnsupportedModelError(
            f"This llama uses the activation {hf['hidden_act']!r}.",
            expected="'silu', as every published Llama does.",
            fix="Use a model of the plain Llama architecture.",
        )
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rms_norm_eps=hf["rms_norm_eps"],
        rope=_rope(hf["rope_parameters"]),
        tie_word_embeddings=bool(hf["tie_word_embeddings"]),
        attention_bias=hf["attention_bias"],
        mlp_bias=hf["mlp_bias"],
        windows=(None,) * hf["num_hidden_layers"],
        max_position=hf["max_position_embeddings"],
    )


def _rope(rope: dict) -> RopeConfig:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return RopeConfig(theta=float(rope["rope_theta"]))
    if kind == "llama3":
        return RopeConfig(
            kind=kind,
            theta=float(rope["rope_theta"]),
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    raise UnsupportedModelError(
        f"This llama scales its rotary embedding by {kind!r}.",
        expected="'default' or 'llama3'.",
        fix="Use a model with one of those.",
    )
