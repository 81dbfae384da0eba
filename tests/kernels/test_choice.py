"""How an op picks its implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.kernels import implementations
from jaxtune.kernels.attention import cudnn
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
    monkeypatch.setattr(cudnn, "capability", lambda: 8.0)
    assert cudnn.why_not_here() is None
    assert cudnn.why_not(bf16, one, None) is None
    assert "layout" in cudnn.why_not(bf16, None, None)
    assert "softcap" in cudnn.why_not(bf16, one, 30.0)
    assert "float32" in cudnn.why_not(bf16.astype(np.float32), one, None)
    assert "one token" in cudnn.why_not(bf16[:, :1], np.array([[1]]), None)
    assert "heads of 36" in cudnn.why_not(bf16[..., :36], one, None)
    assert "capability 9.0" in cudnn.why_not(bf16, two, None)
    monkeypatch.setattr(cudnn, "capability", lambda: 9.0)
    assert cudnn.why_not(bf16, two, None) is None
    many = jax.ShapeDtypeStruct((2, 2**19 // 2, 32, 128), "bfloat16")
    assert cudnn.why_not(many, one, None) is None
    assert "32 bits" in cudnn.why_not(many, two, None)
    monkeypatch.setattr(cudnn, "capability", lambda: 7.5)
    assert "8.0" in cudnn.why_not_here()


def test_what_cudnn_is_told_of_pieces():
    """Lengths, and where each begins among all tokens; what is no piece comes last, beyond them."""
    lengths, starts = cudnn._packing(jnp.array([[0, 5], [7, 0], [3, 0]]), 15)
    assert lengths.tolist() == [[5, 7], [3, 0], [0, 0]]
    assert starts.tolist() == [[0, 5, 12], [15, 15, 15], [15, 15, 15]]


def test_every_op_runs_on_this_machine():
    assert set(implementations()) == {"attention", "linear_cross_entropy", "nf4_matmul"}
