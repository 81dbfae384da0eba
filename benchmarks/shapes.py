"""The published shapes that benchmarks run in, and a tiny one that checks their scripts on a CPU."""

import dataclasses

from jaxtune.models.config import LayerKind, ModelConfig, RopeConfig

LLAMA3_ROPE = RopeConfig(
    kind="llama3",
    theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position=8192,
)
SHAPES = {
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8, head_dim=128,
        rms_norm_eps=1e-5, tie_word_embeddings=False, layers=(LayerKind(),) * 32, ropes=(LLAMA3_ROPE,),
        max_position=131072,
    ),
    "llama-3.1-70b": ModelConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_heads=64, num_kv_heads=8, head_dim=128,
        rms_norm_eps=1e-5, tie_word_embeddings=False, layers=(LayerKind(),) * 80, ropes=(LLAMA3_ROPE,),
        max_position=131072,
    ),
    "llama-3.2-1b": ModelConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_heads=32, num_kv_heads=8, head_dim=64,
        rms_norm_eps=1e-5, tie_word_embeddings=True, layers=(LayerKind(),) * 16,
        ropes=(dataclasses.replace(LLAMA3_ROPE, factor=32.0),), max_position=131072,
    ),
    "gemma-2-9b": ModelConfig(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_heads=16, num_kv_heads=8, head_dim=256,
        rms_norm_eps=1e-6, tie_word_embeddings=True, layers=(LayerKind(window=4096), LayerKind()) * 21,
        ropes=(RopeConfig(theta=1e4),), max_position=8192, activation="gelu_tanh", norms="both", norm_adds_one=True,
        norm_rounds_last=True, attention_softcap=50.0, embedding_multiplier=3584**0.5, logit_softcap=30.0,
    ),
    "tiny": ModelConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=32,
        rms_norm_eps=1e-5, tie_word_embeddings=False, layers=(LayerKind(),) * 2, ropes=(LLAMA3_ROPE,),
        max_position=131072,
    ),
}  # fmt: skip
