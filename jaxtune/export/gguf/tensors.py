"""A Llama's weights as llama.cpp names and orders them, and the settings that it reads beside them.

llama.cpp turns neighbouring pairs (2i, 2i + 1) where Hugging Face's Llama turns (i, i + D/2): the rows of q and k
change places for it. Llama 3's stretched wavelengths travel as a tensor of factors, `rope_freqs.weight`.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.errors import CheckpointError, UnsupportedModelError
from jaxtune.export.gguf.mixtures import Layout, place, tensor_types
from jaxtune.export.gguf.quants import TensorType
from jaxtune.export.gguf.writer import TensorInfo
from jaxtune.models.config import LayerKind, ModelConfig
from jaxtune.models.rope import frequencies

ROPE_FACTORS = "rope_freqs.weight"
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


_LLAMAS_OWN = {"max_position", "qkv_bias", "o_bias", "mlp_bias"}
"""Settings with a default that a Llama may change."""


def require_llama(c: ModelConfig) -> None:
    """Everything beyond Llama's graph would be left out by a reader of `general.architecture` "llama"."""
    more = [
        field.name
        for field in dataclasses.fields(c)
        if field.default is not dataclasses.MISSING
        and field.name not in _LLAMAS_OWN
        and getattr(c, field.name) != field.default
    ]
    if c.qkv_bias != c.o_bias:
        more.append("qkv_bias without o_bias" if c.qkv_bias else "o_bias without qkv_bias")
    if set(c.layers) != {LayerKind()}:
        more.append("windows or layers without positions")
    if any(rope.dim is not None or rope.attention_factor != 1 for rope in c.ropes):
        more.append("a partial or scaled rotary embedding")
    if more:
        raise UnsupportedModelError(
            f"This model is more than a Llama: it has {', '.join(more)}.",
            expected="Llama's own architecture (a Mistral without a window has it); no other is written as GGUF yet.",
            fix="Save it with save_pretrained_merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
        )


def settings(c: ModelConfig) -> dict[str, Any]:
    """The key/values of `general.architecture` "llama"."""
    return {
        "llama.block_count": np.uint32(c.num_layers),
        "llama.context_length": np.uint32(c.max_position),
        "llama.embedding_length": np.uint32(c.hidden_size),
        "llama.feed_forward_length": np.uint32(c.intermediate_size),
        "llama.attention.head_count": np.uint32(c.num_heads),
        "llama.attention.head_count_kv": np.uint32(c.num_kv_heads),
        "llama.attention.key_length": np.uint32(c.head_dim),
        "llama.attention.value_length": np.uint32(c.head_dim),
        "llama.attention.layer_norm_rms_epsilon": np.float32(c.rms_norm_eps),
        "llama.rope.dimension_count": np.uint32(c.head_dim),
        "llama.rope.freq_base": np.float32(c.ropes[0].theta),
        "llama.vocab_size": np.uint32(c.vocab_size),
    }


def gguf_names(c: ModelConfig, hf_names: Iterable[str], source: object) -> dict[str, str]:
    """GGUF name -> Hugging Face name, in the file's order."""
    renamed = {}
    for name in hf_names:
        # A tied head is the embedding; some checkpoints of Llama 2 store the frequencies, which the config gives.
        if (name == "lm_head.weight" and c.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
            continue
        renamed[_gguf_name(name, source)] = name
    return dict(sorted(renamed.items(), key=lambda item: place(item[0])))


def layout(c: ModelConfig) -> Layout:
    return Layout("llama", c.num_layers, c.num_heads, c.num_kv_heads)


def file_tensors(
    c: ModelConfig, shapes: Mapping[str, tuple[int, ...]], method: str, *, weighted: bool = False
) -> Iterator[TensorInfo]:
    """What a file of `method` holds, of tensors of these shapes."""
    if c.ropes[0].kind != "default":
        yield TensorInfo(ROPE_FACTORS, (c.head_dim // 2,), TensorType.F32)
    types = tensor_types(method, shapes, layout(c), weighted=weighted)
    for name, shape in shapes.items():
        yield TensorInfo(name, shape, types[name])


def reorder(c: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    """Rows of q and k, and their biases, in llama.cpp's order; anything else as it is."""
    heads = {"attn_q": c.num_heads, "attn_k": c.num_kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return array
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def rope_factors(c: ModelConfig) -> np.ndarray:
    """By how much each frequency is slowed, float32 [head_dim / 2]."""
    rope = c.ropes[0]
    plain = dataclasses.replace(rope, kind="default")
    return frequencies(plain, c.head_dim) / frequencies(rope, c.head_dim)


def _gguf_name(name: str, source: object) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if (found := _LAYER.fullmatch(name)) and found[2] in _INSIDE:
        return f"blk.{found[1]}.{_INSIDE[found[2]]}.{found[3]}"
    raise CheckpointError(
        f"{source} holds {name}, which has no place in a GGUF of this architecture.",
        expected="the weights of a Llama.",
        fix="Remove that tensor from the checkpoint if it is left over from another model.",
    )
