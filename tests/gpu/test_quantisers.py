"""GGUF's types by programs on the GPU, which must give numpy's bytes; tests/export/test_gguf_quants.py compares those
with llama.cpp's."""

import numpy as np
import pytest

from jaxtune.export.gguf.quants import encode, encoding
from tests.export import gguf_cases
from tests.kit import gpu_runs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("importance", ["plain", "weighted"])
@pytest.mark.parametrize("type", encoding.ON_DEVICE, ids=lambda type: type.name)
def test_a_program_on_the_gpu_gives_numpy_s_bytes(monkeypatch, type, importance):
    rng = np.random.default_rng(gpu_runs.SEED)
    special = np.concatenate([*gguf_cases.rows().values()])
    normal = rng.standard_normal((4096, gguf_cases.COLUMNS)).astype(np.float32) / 32
    heavy = rng.standard_t(3, (4096, gguf_cases.COLUMNS)).astype(np.float32) / 32
    rows = np.concatenate([special, normal, heavy])
    columns = np.ldexp(0.1 + rng.random(gguf_cases.COLUMNS), rng.integers(-12, 12, gguf_cases.COLUMNS))
    columns = None if importance == "plain" else columns.astype(np.float32)
    monkeypatch.setattr(encoding, "WORTH_COMPILING", rows.size + 1)
    exact = encode(rows, type, "x", columns)
    left_over, encode_rows = [], encoding.on_device.encode_rows
    by_numpy = lambda in_numpy: lambda odd: left_over.append(len(odd)) or in_numpy(odd)
    monkeypatch.setattr(
        encoding.on_device, "encode_rows", lambda *given: encode_rows(*given[:-1], by_numpy(given[-1]))
    )
    monkeypatch.setattr(encoding, "WORTH_COMPILING", 0)
    found = encode(rows, type, "x", columns)
    np.testing.assert_array_equal(found, exact)
    numbers = sum(left_over) * (type.block if columns is None else gguf_cases.COLUMNS)
    assert numbers < rows.size / 4, "most is the GPU's"
