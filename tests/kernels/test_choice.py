"""How an op picks its implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import implementations
from jaxtune.kernels.attention import api, attention, cudnn
from jaxtune.kernels.choice import choose
from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy

CANDIDATES = {"fast": lambda: "no such GPU", "middle": lambda: None, "xla": None}


def test_none_takes_the_first_that_can_run():
    assert choose("op", None, CANDIDATES) == "middle"


def test_a_name_forces():
    assert choose("op", "xla", CANDIDATES) == "xla"


def test_a_forced_choice_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="no such GPU"):
        choose("op", "fast", CANDIDATES)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="fast, middle, xla"):
        choose("op", "quick", CANDIDATES)


def test_ops_take_the_choice():
    x, w, y = np.zeros((3, 4), np.float32), np.zeros((5, 4), np.float32), np.zeros(3, np.int32)
    linear_cross_entropy(x, w, y, implementation="xla")
    with pytest.raises(ValueError, match="no implementation 'mosaic'"):
        linear_cross_entropy(x, w, y, implementation="mosaic")


def test_what_cudnn_cannot_do(monkeypatch):
    """On a GPU that has it; here a pretended one."""
    bf16, one, two = np.zeros((1, 8, 4, 64), jnp.bfloat16), np.array([[8]]), np.array([[4, 4]])
    why_not = functools.partial(cudnn.why_not, sinks_H=None)
    monkeypatch.setattr(cudnn, "capability", lambda: 8.0)
    assert cudnn.why_not_here() is None
    assert why_not(bf16, one, None) is None
    assert "layout" in why_not(bf16, None, None)
    assert "softcap" in why_not(bf16, one, 30.0)
    assert "sinks" in why_not(bf16, one, None, sinks_H=np.zeros(4))
    assert "float32" in why_not(bf16.astype(np.float32), one, None)
    assert "one token" in why_not(bf16[:, :1], np.array([[1]]), None)
    assert "heads of 36" in why_not(bf16[..., :36], one, None)
    assert "capability 9.0" in why_not(bf16, two, None)
    monkeypatch.setattr(cudnn, "capability", lambda: 9.0)
    assert why_not(bf16, two, None) is None
    many = jax.ShapeDtypeStruct((2, 2**19 // 2, 32, 128), "bfloat16")
    assert why_not(many, one, None) is None
    assert "32 bits" in why_not(many, two, None)
    monkeypatch.setattr(cudnn, "capability", lambda: 7.5)
    assert "8.0" in cudnn.why_not_here()


def test_which_attention_is_taken_where_both_run(monkeypatch):
    """Ours in packed rows and windows; of whole rows as long as was measured to be worth it."""
    monkeypatch.setattr(api, "choose", lambda op, requested, candidates: next(iter(candidates)))
    taken = []
    monkeypatch.setattr(api.cudnn, "attention", lambda q, *_, **__: taken.append("cudnn"))
    monkeypatch.setattr(api.mosaic_gpu, "attention", lambda q, *_, **__: (taken.append("ours"), None))

    def asked(length, size, parts=1, **form):
        q = jax.ShapeDtypeStruct((1, length, 2, size), jnp.bfloat16)
        ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
        pieces = jax.ShapeDtypeStruct((1, parts), jnp.int32)
        attention(q, q, q, q_segments_BT=ids, kv_segments_BS=ids, q_positions_BT=ids, kv_positions_BS=ids,
                  pieces_GM=pieces, scale=1.0, **form)  # fmt: skip
        return taken.pop()

    assert asked(32768, 128) == asked(8192, 96) == asked(2048, 64) == asked(2048, 256) == "cudnn"
    assert asked(4096, 96) == asked(2048, 128) == asked(16384, 128) == "ours"
    assert asked(16384, 128, parts=2) == asked(16384, 256, parts=2) == asked(16384, 64, window=100) == "ours"
    assert asked(16384, 256, window=100) == "cudnn"


def test_what_cudnn_is_told_of_pieces():
    """Lengths, and where each begins among all tokens; what is no piece comes last, beyond them."""
    lengths, starts = cudnn._packing(jnp.array([[0, 5], [7, 0], [3, 0]]), 15)
    assert lengths.tolist() == [[5, 7], [3, 0], [0, 0]]
    assert starts.tolist() == [[0, 5, 12], [15, 15, 15], [15, 15, 15]]


def test_every_op_runs_on_this_machine():
    assert set(implementations()) == {"attention", "linear_cross_entropy", "nf4_matmul"}
