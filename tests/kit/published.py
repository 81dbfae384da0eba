"""Models as people have published them. Their files are read where the project keeps them, beside the repository, and
are not ours to commit; what a fresh clone needs is written down here as plain facts."""

from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[3] / "shared" / "fixtures" / "published"


def folders(having: str) -> list[Path]:
    """The published folders that hold such a file; none where there are no fixtures."""
    return [path.parent for path in sorted(FOLDER.glob(f"*/{having}"))]


def said() -> str:
    """One line for the head of a test run."""
    found = len(folders("*config.json"))
    return f"published files: {found} folders" if found else f"published files: none, {FOLDER} is not there"


class Facts(NamedTuple):
    """What a family's model is: its config in the spelling of its day, the weights of a layer, and how many numbers
    its model card counts."""

    config: dict[str, Any]
    layer: str
    parameters: int


ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
MLP = "mlp.gate_proj mlp.up_proj mlp.down_proj"
BEFORE = "input_layernorm post_attention_layernorm"
AROUND = f"{BEFORE} pre_feedforward_layernorm post_feedforward_layernorm"
QK_NORM = "self_attn.q_norm self_attn.k_norm"
QKV_BIAS = "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"
LLAMA = f"{ATTENTION} {MLP} {BEFORE}"


def sizes(
    vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
    }  # fmt: skip


FACTS: dict[str, Facts] = {
    "llama-3.1-8b": Facts(
        {
            "model_type": "llama", **sizes(128256, 4096, 14336, 32, 32, 8), "max_position_embeddings": 131072,
            "rope_theta": 5e5, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        LLAMA, 8_030_261_248,
    ),
    "mistral-7b-v0.3": Facts(
        {
            "model_type": "mistral", **sizes(32768, 4096, 14336, 32, 32, 8), "max_position_embeddings": 32768,
            "rope_theta": 1e6, "rms_norm_eps": 1e-5, "sliding_window": None, "tie_word_embeddings": False,
        },
        LLAMA, 7_248_023_552,
    ),
    "qwen2.5-7b": Facts(
        {
            "model_type": "qwen2", **sizes(152064, 3584, 18944, 28, 28, 4), "max_position_embeddings": 32768,
            "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": False,
            "sliding_window": 131072, "max_window_layers": 28,
        },
        f"{LLAMA} {QKV_BIAS}", 7_615_616_512,
    ),
    "qwen3-0.6b": Facts(
        {
            "model_type": "qwen3", **sizes(151936, 1024, 3072, 28, 16, 8), "max_position_embeddings": 40960,
            "head_dim": 128, "rope_theta": 1000000, "rope_scaling": None, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": True, "attention_bias": False, "use_sliding_window": False, "sliding_window": None,
        },
        f"{LLAMA} {QK_NORM}", 596_049_920,
    ),
    "gemma-2b": Facts(
        {
            "model_type": "gemma", **sizes(256000, 2048, 16384, 18, 8, 1), "max_position_embeddings": 8192,
            "head_dim": 256, "hidden_act": "gelu", "rope_theta": 1e4, "rms_norm_eps": 1e-6,
        },
        LLAMA, 2_506_172_416,
    ),
    "gemma-2-2b": Facts(
        {
            "model_type": "gemma2", **sizes(256000, 2304, 9216, 26, 8, 4), "max_position_embeddings": 8192,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1e4, "rms_norm_eps": 1e-6,
            "sliding_window": 4096, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0, "cache_implementation": "hybrid",
        },
        f"{ATTENTION} {MLP} {AROUND}", 2_614_341_888,
    ),
    "gemma-3-1b": Facts(
        {
            "model_type": "gemma3_text", **sizes(262144, 1152, 6912, 26, 4, 1), "max_position_embeddings": 32768,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rope_theta": 1000000,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rms_norm_eps": 1e-6, "sliding_window": 512,
            "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
        },
        f"{ATTENTION} {MLP} {AROUND} {QK_NORM}", 999_885_952,
    ),
    "phi-3-mini-4k": Facts(
        {
            "model_type": "phi3", **sizes(32064, 3072, 8192, 32, 32, 32), "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096, "rope_theta": 1e4, "rope_scaling": None, "rms_norm_eps": 1e-5,
            "sliding_window": 2047, "tie_word_embeddings": False,
        },
        f"self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj {BEFORE}", 3_821_079_552,
    ),
    "olmo-2-7b": Facts(
        {
            "model_type": "olmo2", **sizes(100352, 4096, 11008, 32, 32, 32), "max_position_embeddings": 4096,
            "rope_theta": 500000, "rope_scaling": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        },
        f"{ATTENTION} {MLP} {QK_NORM} post_attention_layernorm post_feedforward_layernorm", 7_298_617_344,
    ),
    "granite-3.1-2b": Facts(
        {
            "model_type": "granite", **sizes(49155, 2048, 8192, 40, 32, 8), "max_position_embeddings": 131072,
            "rope_theta": 5000000.0, "rope_scaling": None, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
            "embedding_multiplier": 12.0, "attention_multiplier": 0.015625, "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
        },
        LLAMA, 2_533_531_648,
    ),
    "smollm3-3b": Facts(
        {
            "model_type": "smollm3", **sizes(128256, 2048, 11008, 36, 16, 4), "max_position_embeddings": 65536,
            "rope_theta": 5000000.0, "rope_scaling": None, "rms_norm_eps": 1e-6, "no_rope_layer_interval": 4,
            "use_sliding_window": False, "sliding_window": None,
        },
        LLAMA, 3_075_098_624,
    ),
}  # fmt: skip
"""Of each family one. Tied heads count once."""
