"""What a file's bytes mean, against the gguf package: for bytes that our quantisers make, and for any others."""

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxtune.export.gguf.quants import TensorType, decode, encode, nbytes
from tests.export import gguf_cases

ROWS = np.concatenate(list(gguf_cases.rows().values()))


def theirs(stored, type):
    with np.errstate(invalid="ignore"):
        return gguf.quants.dequantize(stored, gguf.GGMLQuantizationType(type))


@pytest.mark.parametrize("type", TensorType, ids=lambda type: type.name)
def test_every_type_means_what_the_gguf_package_says(type):
    importance = gguf_cases.importance()["weighted"] if type.needs_importance else None
    stored = encode(ROWS, type, "x", importance).reshape(len(ROWS), -1)
    found = decode(stored, type)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, theirs(stored, type))


QUANTISED = [type for type in TensorType if type.block > 1]


@pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)
def test_every_bit_pattern_too(type):
    """Also those that no quantiser of ours writes; of scales, only the finite ones."""
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (500, nbytes((512,), type)), np.uint8)
    expected = theirs(stored, type)
    finite = np.isfinite(expected).all(axis=1)
    assert finite.sum() > 100
    np.testing.assert_array_equal(decode(stored[finite], type), expected[finite])


def test_leading_axes_are_kept():
    x = np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64)
    stored = encode(x, TensorType.BF16, "x").reshape(2, 3, -1)
    np.testing.assert_array_equal(decode(stored, TensorType.BF16), x.astype(ml_dtypes.bfloat16))
