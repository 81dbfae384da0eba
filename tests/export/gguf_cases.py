"""What is quantised and which models are mixed, to compare with llama.cpp: `scripts/make_gguf_golden.py` records there
what it makes of them, and the tests repeat them here."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

GOLDEN = Path(__file__).parent / "golden"
BLOCKS_FILE, TYPES_FILE = GOLDEN / "gguf_blocks.npz", GOLDEN / "gguf_types.npz"
COLUMNS = 512


def importance() -> dict[str, np.ndarray | None]:
    """Of the columns: none, as it is measured, and with columns that were never active."""
    rng = np.random.default_rng(1)
    measured = rng.standard_normal(COLUMNS) ** 2 * np.ldexp(1.0, rng.integers(-6, 4, COLUMNS))
    found = {"plain": None, "weighted": measured, "sparse": np.where(rng.random(COLUMNS) < 0.8, 0, measured)}
    return {name: values if values is None else values.astype(np.float32) for name, values in found.items()}


def rows() -> dict[str, np.ndarray]:
    """float32 [rows, COLUMNS] of every kind. Powers of two alone scale them: other powers differ between machines."""
    rng = np.random.default_rng(0)
    normal = lambda rows=12: rng.standard_normal((rows, COLUMNS))

    def in_sub_blocks(change: np.ndarray, n: int) -> np.ndarray:
        """`change` of one in three sub-blocks of n."""
        return np.where(
            np.repeat(rng.random((len(change), COLUMNS // n)) < 1 / 3, n, axis=1), change, normal()
        )

    def exponents(low: int, high: int, n: int) -> np.ndarray:
        return np.repeat(rng.integers(low, high, (12, COLUMNS // n)), n, axis=1)

    alone = np.zeros((12, COLUMNS))
    alone[np.arange(12), rng.integers(0, COLUMNS, 12)] = rng.standard_normal(12)
    found = {
        "normal": np.ldexp(normal(48), -5),
        "heavy tails": np.ldexp(rng.standard_t(3, (24, COLUMNS)), -5),
        "of bf16": np.ldexp(normal(24), -5).astype(ml_dtypes.bfloat16),
        "constant": np.repeat(rng.standard_normal((12, 1)), COLUMNS, axis=1),
        "constant sub-blocks": np.repeat(rng.standard_normal((12, COLUMNS // 16)), 16, axis=1),
        "zeros": np.zeros((2, COLUMNS)),
        "zeros of both signs": np.where(rng.random((6, COLUMNS)) < 0.5, 0.0, -0.0),
        "sub-blocks of 16 zeros": in_sub_blocks(np.zeros((12, COLUMNS)), 16),
        "sub-blocks of 32 zeros": in_sub_blocks(np.zeros((12, COLUMNS)), 32),
        "sub-blocks without negatives": in_sub_blocks(np.abs(normal()), 32),
        "sub-blocks without positives": in_sub_blocks(-np.abs(normal()), 32),
        "far above zero": 3 + np.ldexp(normal(), -10),
        "far below zero": np.ldexp(normal(), -10) - 3,
        "one number": alone,
        "one outlier": np.where(rng.random((12, COLUMNS)) < 1 / COLUMNS, np.ldexp(normal(), 12), normal()),
        "few values": rng.choice([-1.0, 0.0, 0.5, 1.0], (12, COLUMNS)),
        "integers": rng.integers(-8, 8, (12, COLUMNS)),
        "denormal": np.ldexp(normal(6), -130),
        "near denormal": np.ldexp(normal(6), exponents(-140, -110, 16)[:6]),
        "scales are denormal": np.ldexp(normal(), exponents(-50, -18, 32)),
        "many sizes": np.ldexp(normal(), exponents(-40, 4, 1)),
        "many sizes of sub-blocks": np.ldexp(normal(), exponents(-40, 4, 16)),
        "large": np.ldexp(normal(), 12),
    }
    return {name: values.astype(np.float32) for name, values in found.items()}


def huge() -> np.ndarray:
    """float32 [rows, COLUMNS], each row twice as large as the one before: somewhere among them, every type's scales
    leave float16's range."""
    rng = np.random.default_rng(3)
    return np.ldexp(rng.uniform(-1, 1, (18, COLUMNS)), np.arange(14, 32)[:, None]).astype(np.float32)


def digests(blocks: np.ndarray) -> np.ndarray:
    """One for each row of bytes."""
    return np.asarray([zlib.crc32(row.tobytes()) for row in blocks], np.uint32)


class Model(NamedTuple):
    """A model as a mixture sees it."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    tied: bool = False
    width: int = 256
    hidden: int = 256
    """Of the MLP: how wide the rows of its way down are."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """GGUF name, shape; rows as few as can be."""
        rows = 2
        yield "token_embd.weight", (rows, self.width)
        yield "output_norm.weight", (self.width,)
        if not self.tied:
            yield "output.weight", (rows, self.width)
        for layer in range(self.layers):
            block = f"blk.{layer}."
            yield block + "attn_norm.weight", (self.width,)
            yield block + "ffn_norm.weight", (self.width,)
            projections = ["attn_qkv"] if self.architecture == "phi3" else ["attn_q", "attn_k", "attn_v"]
            for name in [*projections, "attn_output"]:
                yield f"{block}{name}.weight", (rows, self.width)
            if self.architecture == "qwen2":
                yield block + "attn_v.bias", (rows,)
            if self.experts:
                yield block + "ffn_gate_inp.weight", (self.experts, self.width)
                for name in ("ffn_gate_exps", "ffn_up_exps"):
                    yield f"{block}{name}.weight", (self.experts, rows, self.width)
                yield block + "ffn_down_exps.weight", (self.experts, rows, self.hidden)
            else:
                for name in ["ffn_up"] if self.architecture == "phi3" else ["ffn_gate", "ffn_up"]:
                    yield f"{block}{name}.weight", (rows, self.width)
                yield block + "ffn_down.weight", (rows, self.hidden)


MODELS = {
    "1 layer": Model("llama", 1, 8, 8),
    "4 layers, tied": Model("llama", 4, 8, 2, tied=True),
    "16 layers, tied, four queries for a key": Model("llama", 16, 32, 8, tied=True),
    "32 layers": Model("llama", 32, 32, 32),
    "32 layers, two queries for a key": Model("llama", 32, 16, 8),
    "80 layers, llama": Model("llama", 80, 64, 8),
    "80 layers, llama of 65B": Model("llama", 80, 64, 64),
    "80 layers, qwen2": Model("qwen2", 80, 64, 64),
    "28 layers, qwen2": Model("qwen2", 28, 28, 4),
    "q, k and v in one": Model("phi3", 32, 32, 32),
    "8 experts": Model("llama", 32, 32, 8, experts=8),
    "128 experts": Model("qwen3moe", 48, 32, 4, experts=128),
    "rows of blocks of 32": Model("llama", 16, 9, 3, tied=True, width=576, hidden=1536),
    "rows of no blocks": Model("llama", 16, 4, 4, width=80, hidden=144),
    "only the MLP's rows of blocks of 32": Model("llama", 16, 8, 2, width=512, hidden=1056),
}
_PLAIN = (
    "q8_0 q4_0 q4_1 q5_0 q5_1 q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k iq4_nl iq4_xs iq3_s iq3_m"
).split()
_WEIGHTED = [*_PLAIN, *"q2_k_s iq1_s iq1_m iq2_xxs iq2_xs iq2_s iq2_m iq3_xxs iq3_xs".split()]
METHODS = [(method, False) for method in _PLAIN] + [(method, True) for method in _WEIGHTED]
"""With an importance matrix or without."""
