"""A model's weights as llama.cpp names, orders and stores them, and the settings that it reads beside them.

Where llama.cpp turns neighbouring pairs (2i, 2i + 1) and Hugging Face (i, i + D/2), the rows of q and k change places.
Norms that multiply by 1 + weight are stored with the 1 added.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from jaxtune.errors import CheckpointError
from jaxtune.export.gguf import ropes
from jaxtune.export.gguf.architectures import Architecture
from jaxtune.export.gguf.mixtures import Layout, place, tensor_types
from jaxtune.export.gguf.quants import TensorType
from jaxtune.export.gguf.writer import TensorInfo
from jaxtune.log import get_logger
from jaxtune.models.config import ModelConfig

log = get_logger(__name__)

_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_PROJECTIONS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
}
_FUSED_PROJECTIONS = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_NORMS = {
    "pre": {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    "post": {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    "both": {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def settings(architecture: Architecture, c: ModelConfig) -> dict[str, Any]:
    """The key/values of `general.architecture`."""
    found: dict[str, Any] = {
        "block_count": np.uint32(c.num_layers),
        "context_length": np.uint32(_context_length(architecture, c)),
        "embedding_length": np.uint32(c.hidden_size),
        "feed_forward_length": np.uint32(c.intermediate_size),
        "attention.head_count": np.uint32(c.num_heads),
        "attention.head_count_kv": np.uint32(c.num_kv_heads),
        "attention.key_length": np.uint32(c.head_dim),
        "attention.value_length": np.uint32(c.head_dim),
        "attention.layer_norm_rms_epsilon": np.float32(c.rms_norm_eps),
        "vocab_size": np.uint32(c.vocab_size),
        **{f"rope.{name}": value for name, value in ropes.keys(architecture, c).items()},
    }
    if architecture.has_windows:
        found["attention.sliding_window"] = np.uint32(_window(c))
    if c.attention_softcap:
        found["attn_logit_softcapping"] = np.float32(c.attention_softcap)
    if c.logit_softcap:
        found["final_logit_softcapping"] = np.float32(c.logit_softcap)
    if architecture.multipliers:
        found["attention.scale"] = np.float32(c.attention_scale)
        found["embedding_scale"] = np.float32(c.embedding_multiplier)
        found["residual_scale"] = np.float32(c.residual_multiplier)
        found["logit_scale"] = np.float32(1 / c.logit_scale)  # which divides
    return {f"{architecture.name}.{name}": value for name, value in found.items()}


def _window(c: ModelConfig) -> int:
    """The smallest, or none: the longest sequence."""
    return min([window for window in c.windows if window is not None], default=c.max_position)


def _context_length(architecture: Architecture, c: ModelConfig) -> int:
    """As long as the file computes what the model does: a window that is left out must not be met."""
    if architecture.has_windows or _window(c) >= c.max_position:
        return c.max_position
    log.info(
        "llama.cpp's %r has no windows: the file says that the model is made for %d tokens, not %d, since up to there "
        "its window sees everything.", architecture.name, _window(c), c.max_position,
    )  # fmt: skip
    return _window(c)


def gguf_names(c: ModelConfig, hf_names: Iterable[str], source: object) -> dict[str, str]:
    """GGUF name -> Hugging Face name, in the file's order."""
    inside = {
        **(_FUSED_PROJECTIONS if c.fused_projections else _PROJECTIONS),
        "self_attn.o_proj": "attn_output",
        "mlp.down_proj": "ffn_down",
        **_NORMS[c.norms],
        **(_QK_NORMS if c.qk_norm else {}),
    }
    renamed = {}
    for name in hf_names:
        # A tied head is the embedding; some checkpoints of Llama 2 store the frequencies, which the config gives.
        if (name == "lm_head.weight" and c.tie_word_embeddings) or name.endswith("rotary_emb.inv_freq"):
            continue
        renamed[_gguf_name(name, inside, source)] = name
    return dict(sorted(renamed.items(), key=lambda item: place(item[0])))


def layout(architecture: Architecture, c: ModelConfig) -> Layout:
    return Layout(architecture.name, c.num_layers, c.num_heads, c.num_kv_heads)


def file_tensors(
    architecture: Architecture,
    c: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    method: str,
    *,
    weighted: bool = False,
) -> Iterator[TensorInfo]:
    """What a file of `method` holds, of tensors of these shapes."""
    for name, factors in ropes.tensors(c).items():
        yield TensorInfo(name, factors.shape, TensorType.F32)
    types = tensor_types(method, shapes, layout(architecture, c), weighted=weighted)
    for name, shape in shapes.items():
        yield TensorInfo(name, shape, types[name])


def as_stored(architecture: Architecture, c: ModelConfig, name: str, array: np.ndarray) -> np.ndarray:
    """A weight as the file has it: rows of q and k, and their biases, in llama.cpp's order, norms whole."""
    heads = {"attn_q": c.num_heads, "attn_k": c.num_kv_heads}.get(name.split(".")[-2])
    if heads is not None and architecture.neighbours:
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return halves.swapaxes(1, 2).reshape(array.shape)
    if c.norm_adds_one and name.endswith("_norm.weight"):
        return array.astype(np.float32) + 1
    return array


def _gguf_name(name: str, inside: Mapping[str, str], source: object) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if (found := _LAYER.fullmatch(name)) and found[2] in inside:
        return f"blk.{found[1]}.{inside[found[2]]}.{found[3]}"
    raise CheckpointError(
        f"{source} holds {name}, which has no place in a GGUF of this architecture.",
        expected="the weights of such a model, and no others.",
        fix="Remove that tensor from the checkpoint if it is left over from another model.",
    )
