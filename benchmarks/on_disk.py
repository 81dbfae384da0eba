"""A checkpoint of random bfloat16 weights in a real model's shape, on local disk, for what reads and writes such; and
the state of its pages, and the most memory that a process takes meanwhile."""

import json
import os
import shutil
import threading
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxtune import assets

SHAPES = {
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=32, max_position_embeddings=131072,
    ),
    "llama-3.2-1b": dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, num_hidden_layers=16, max_position_embeddings=131072, tie_word_embeddings=True,
    ),
    "tiny": dict(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_attention_heads=4,
        num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=512,
    ),
}  # fmt: skip
SHARD = 4_500_000_000


def weights(c: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of the layers."""
    width, ffn = c["hidden_size"], c["intermediate_size"]
    kv = width // c["num_attention_heads"] * c["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,), "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width),
        "self_attn.v_proj": (kv, width), "self_attn.o_proj": (width, width), "post_attention_layernorm": (width,),
        "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width), "mlp.down_proj": (width, ffn),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width)}
    for i in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    return shapes if c.get("tie_word_embeddings") else shapes | {"lm_head.weight": (c["vocab_size"], width)}


def make(folder: Path, c: dict, shard: int) -> None:
    """Shards, config and a small tokenizer. The weights are normal: 4 million draws, repeated, fill each tensor."""
    from safetensors.numpy import save_file
    from transformers import LlamaConfig

    normal = (0.02 * np.random.default_rng(0).standard_normal(2**22 + 17)).astype(ml_dtypes.bfloat16)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in weights(c).items():
        if 2 * sum(map(np.prod, [*groups[-1].values(), shape])) > shard:
            groups.append({})
        groups[-1][name] = shape
    weight_map = {}
    for n, group in enumerate(groups, 1):
        file = f"model-{n:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: np.ones(shape, ml_dtypes.bfloat16) if "norm" in name else np.resize(normal, shape)
            for name, shape in group.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    LlamaConfig(**c, dtype="bfloat16").save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets.TINY / file, folder / file)


def drop_pages(folder: Path) -> None:
    """Asks the kernel to forget the files' pages; another process' use of them, or a lazy kernel, keeps some."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm_pages(folder: Path) -> None:
    buffer = bytearray(1 << 24)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


class HostPeak:
    """The most memory of the process' own, above what it had at the start; pages of mapped files are not counted."""

    def __init__(self):
        self.start = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._done.set()
        self._thread.join()

    @property
    def gb(self) -> float:
        return (self.peak - self.start) / 1e9

    def _watch(self):
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> int:
        """Anonymous and shared-memory pages (what a driver pins may be either)."""
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
        )
        if "RssAnon" not in status:
            return int(status["VmRSS"].split()[0]) * 1024
        return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
