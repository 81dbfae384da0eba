"""How an op picks its implementation."""

import numpy as np
import pytest

from jaxtune.kernels import implementations
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


def test_every_op_runs_on_this_machine():
    assert set(implementations()) == {"attention", "linear_cross_entropy", "nf4_matmul"}
