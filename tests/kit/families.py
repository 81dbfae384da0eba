"""One table of tiny models over all families: what transformers builds them from, and what is peculiar to each."""

import json
from pathlib import Path

import torch
import transformers

from tests.kit.models import LLAMA3_ROPE, VOCAB, perturbed

WINDOW = 8
"""Shorter than the sequences that tests use, so that they leave it."""
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "attn_implementation": "eager",  # the only one that caps scores
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
}
LOCAL_GLOBAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}
S, F = "sliding_attention", "full_attention"

CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, dynamic": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        },
    ),
    "mistral, window": ("mistral", {"sliding_window": WINDOW}),
    "mistral nemo": ("mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, late windows": (
        "qwen2",
        {"num_hidden_layers": 5, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, layer types": (
        "qwen3",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [S, F, S]},
    ),
    "gemma": ("gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            "num_hidden_layers": 5, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
            "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            "num_hidden_layers": 7, "head_dim": 24, "sliding_window": WINDOW, "query_pre_attn_scalar": 20,
            "layer_types": [S, S, F, S, S, F, S], "rope_parameters": LOCAL_GLOBAL,
        },
    ),
    "phi3": ("phi3", {}),
    "phi3, window": ("phi3", {"sliding_window": WINDOW}),
    "phi4-mini": (
        "phi3",
        {
            "rope_parameters": {**LONG, "partial_rotary_factor": 0.5},
            "original_max_position_embeddings": 64, "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0, "attention_multiplier": 0.15, "residual_multiplier": 0.22,
            "logits_scaling": 8.0, "attention_bias": True, "mlp_bias": True,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layer_interval": 2}),
    "smollm3, windows": (
        "smollm3",
        {
            "num_hidden_layers": 3, "no_rope_layer_interval": 3,
            "use_sliding_window": True, "sliding_window": WINDOW,
        },
    ),
}  # fmt: skip

EACH: dict[str, str] = {model_type: case for case, (model_type, _) in reversed(CASES.items())}
"""Each family's `model_type`, and the first of its cases."""


def random_model(case: str, seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    model_type, settings = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **settings, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return perturbed(model, 5.0)


def spell_rope_as_before(folder: Path) -> None:
    """A Gemma 3's config.json as transformers 4 wrote it."""
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    ropes = settings.pop("rope_parameters")
    settings["rope_theta"] = ropes["full_attention"]["rope_theta"]
    settings["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    path.write_text(json.dumps({**settings, "rope_scaling": None}))
