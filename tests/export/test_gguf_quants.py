"""Every type and every mixture against what llama.cpp's own quantiser made of the same numbers and models."""

import math
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from jaxtune.errors import OptionError
from jaxtune.export.gguf.mixtures import MIXTURES, Layout, tensor_types
from jaxtune.export.gguf.quants import TensorType, encode, encoding, nbytes
from tests.export import gguf_cases
from tests.kit.compare import relative_rms

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
QUANTISED = [type for type in TensorType if type.block > 1]
ROWS = gguf_cases.rows()
IMPORTANCE = gguf_cases.importance()
ALL_ROWS = np.concatenate(list(ROWS.values()))


def least_importance(type):
    """For types that need one."""
    return IMPORTANCE["weighted"] if type.needs_importance else None


every_type = pytest.mark.parametrize("type", QUANTISED, ids=lambda type: type.name)


@pytest.fixture(scope="module")
def recorded():
    return np.load(gguf_cases.BLOCKS_FILE)


def test_the_inputs_are_those_of_the_record(recorded):
    for name, rows in ROWS.items():
        np.testing.assert_array_equal(gguf_cases.digests(rows), recorded[f"input/{name}"], name)


@pytest.fixture
def on_device(monkeypatch):
    """By a compiled program, which small tensors are not worth; the fixture lists how many rows it left to numpy."""
    left_over, encode_rows = [], encoding.on_device.encode_rows

    def counting(rows, quantiser, row_bytes, importance, in_numpy):
        left_over.append(0)

        def counted(odd):
            left_over[-1] += len(odd)
            return in_numpy(odd)

        return encode_rows(rows, quantiser, row_bytes, importance, counted)

    monkeypatch.setattr(encoding, "WORTH_COMPILING", 0)
    monkeypatch.setattr(encoding, "SOONER_IN_NUMPY", set())
    monkeypatch.setattr(encoding.on_device, "encode_rows", counting)
    return left_over


@pytest.mark.parametrize("type", encoding.ON_DEVICE, ids=lambda type: type.name)
def test_every_block_of_a_program_is_llama_cpp_s(recorded, on_device, type):
    found = gguf_cases.digests(encode(ALL_ROWS, type, "x").reshape(len(ALL_ROWS), -1))
    kinds = np.repeat(list(ROWS), [len(rows) for rows in ROWS.values()])
    assert not list(kinds[found != recorded[f"{type.name}/plain"]])
    assert 0 < on_device[0] * type.block < ALL_ROWS.size / 4


@pytest.mark.parametrize("type", encoding.ON_DEVICE, ids=lambda type: type.name)
def test_a_program_gives_numpy_s_bytes_with_an_importance(on_device, monkeypatch, type):
    rng = np.random.default_rng(4)
    importance = np.ldexp(
        0.1 + rng.random(gguf_cases.COLUMNS), rng.integers(-12, 12, gguf_cases.COLUMNS)
    ).astype(np.float32)
    importance[::7] = 0
    kinds = [rows for name, rows in ROWS.items() if name not in ("denormal", "near denormal")]
    rows = np.concatenate([*kinds, rng.standard_normal((2000, gguf_cases.COLUMNS)).astype(np.float32) / 32])
    found = encode(rows, type, "x", importance)
    assert 0 < on_device[0] < len(rows) / 4
    monkeypatch.setattr(encoding, "ON_DEVICE", {})
    np.testing.assert_array_equal(found, encode(rows, type, "x", importance))


def test_what_numpy_does_sooner_is_left_to_it(on_device, monkeypatch):
    monkeypatch.setattr(encoding, "SOONER_IN_NUMPY", {TensorType.Q3_K})
    encode(ROWS["normal"], TensorType.Q3_K, "x")
    assert not on_device
    encode(ROWS["normal"], TensorType.Q8_0, "x")
    assert len(on_device) == 1


@pytest.mark.parametrize("weights", IMPORTANCE)
@every_type
def test_every_block_is_llama_cpp_s(recorded, type, weights):
    if type.needs_importance and weights == "plain":
        with pytest.raises(OptionError, match=f"x is to become {type.name}, and has no importance"):
            encode(ALL_ROWS, type, "x")
        return
    found = gguf_cases.digests(encode(ALL_ROWS, type, "x", IMPORTANCE[weights]).reshape(len(ALL_ROWS), -1))
    kinds = np.repeat(list(ROWS), [len(rows) for rows in ROWS.values()])
    differ = found != recorded[f"{type.name}/{weights}"]
    if type is TensorType.IQ3_S:
        np.testing.assert_array_equal(differ, misplaced_by_llama_cpp(ALL_ROWS))
    else:
        assert not list(kinds[differ])


def misplaced_by_llama_cpp(rows):
    """Its IQ3_S forgets to step over a sub-block of zeros: what follows is written in its place."""
    zeros = (rows.reshape(len(rows), -1, 8, 32) == 0).all(axis=3)
    return (zeros[..., :-1] & ~zeros[..., 1:]).any(axis=(1, 2))


@every_type
def test_huge_values_are_held_as_far_as_llama_cpp_holds_them(recorded, type):
    expected = recorded[f"{type.name}/huge"]
    assert 0 < np.count_nonzero(expected) < len(expected)
    for row, digest in zip(gguf_cases.huge(), expected, strict=True):
        if digest:
            assert gguf_cases.digests(encode(row[None], type, "x", least_importance(type))[None]) == digest
        else:
            with pytest.raises(OptionError, match=f"x holds values that {type.name} cannot"):
                encode(row[None], type, "x", least_importance(type))


@every_type
def test_a_block_does_not_depend_on_its_company(type):
    """One block alone, where numpy would add in another order, and more rows than are converted at once."""
    rows = np.random.default_rng(2).standard_normal((1100, 256)).astype(np.float32)
    importance = None if least_importance(type) is None else least_importance(type)[:256]
    together = encode(rows, type, "x", importance).reshape(1100, -1)
    for n in (0, 1023, 1024, 1099):
        block = rows[n : n + 1, : type.block]
        np.testing.assert_array_equal(encode(block, type, "x", importance), together[n, : type.block_bytes])


ERROR = {
    "Q8_0": 0.0055, "Q6_K": 0.0180, "Q5_1": 0.0385, "Q5_K": 0.0365, "Q5_0": 0.0430, "Q4_K": 0.0720, "IQ4_NL": 0.0775,
    "IQ4_XS": 0.0780, "Q4_1": 0.0790, "Q4_0": 0.0865, "Q3_K": 0.1530, "IQ3_S": 0.1660, "IQ3_XXS": 0.1830,
    "IQ2_S": 0.2500, "Q2_K": 0.2950, "IQ2_XS": 0.3000, "IQ2_XXS": 0.3450, "IQ1_M": 0.4550, "IQ1_S": 0.4900,
}  # fmt: skip
"""Of normal numbers: the root mean square of what is lost, in units of what there was."""


@every_type
def test_how_near_the_values_come_back(type):
    x = ROWS["normal"]
    ones = np.ones(gguf_cases.COLUMNS, np.float32) if type.needs_importance else None
    back = gguf.quants.dequantize(
        encode(x, type, "x", ones).reshape(len(x), -1), gguf.GGMLQuantizationType(type)
    )
    assert 0.97 * ERROR[type.name] < relative_rms(back, x) < ERROR[type.name]


@pytest.mark.parametrize("value", [1e12, np.inf, np.nan])
@every_type
def test_what_a_type_cannot_hold_raises(type, value):
    x = np.ones((2, 256), np.float32)
    x[1, 7] = value
    with pytest.raises(OptionError, match=rf"blk\.0\.ffn_up\.weight holds values that {type.name} cannot"):
        encode(x, type, "blk.0.ffn_up.weight", np.ones(256, np.float32) if type.needs_importance else None)


def types_of(model, method, weighted=False):
    layout = Layout(model.architecture, model.layers, model.heads, model.kv_heads, model.experts)
    return tensor_types(method, dict(model.shapes()), layout, weighted=weighted)


@pytest.mark.parametrize("name", gguf_cases.MODELS)
def test_every_tensor_has_the_type_that_llama_cpp_gives_it(name):
    model = gguf_cases.MODELS[name]
    recorded = np.load(gguf_cases.TYPES_FILE)[name]
    for (method, weighted), expected in zip(gguf_cases.METHODS, recorded, strict=True):
        found = types_of(model, method, weighted)
        differ = {
            name: (found[name].name, TensorType(expected).name)
            for (name, _), expected in zip(model.shapes(), expected, strict=True)
            if found[name] != expected
        }
        assert not differ, (method, weighted)


def counts(types):
    found = [type.name for type in types.values() if type is not TensorType.F32]
    return {name: found.count(name) for name in sorted(set(found))}


@pytest.mark.parametrize(
    ("method", "expected"),
    {
        "q4_k_m": {"Q4_K": 24, "Q6_K": 5},
        "q5_k_m": {"Q5_K": 24, "Q6_K": 5},
        "q3_k_m": {"Q3_K": 16, "Q4_K": 10, "Q5_K": 2, "Q6_K": 1},
        "q3_k_l": {"Q3_K": 16, "Q5_K": 12, "Q6_K": 1},
        "q2_k": {"Q2_K": 16, "Q3_K": 12 - 4, "Q4_K": 4, "Q6_K": 1},
        "q2_k_l": {"Q2_K": 16, "Q3_K": 12 - 4, "Q4_K": 4, "Q8_0": 1},
        "bf16": {"BF16": 29},
    }.items(),
)
def test_a_mixture_of_four_layers(method, expected):
    assert counts(types_of(gguf_cases.MODELS["4 layers, tied"], method)) == expected


def test_q2_k_l_keeps_both_ends():
    found = types_of(gguf_cases.MODELS["1 layer"], "q2_k_l")
    assert found["output.weight"] is found["token_embd.weight"] is TensorType.Q8_0
    assert MIXTURES["q2_k_l"].file_type == gguf.LlamaFileType.MOSTLY_Q2_K


def test_file_types_are_those_of_the_gguf_package():
    numbers = {method: mixture.file_type for method, mixture in MIXTURES.items() if method != "q2_k_l"}
    assert numbers == {
        method: gguf.LlamaFileType["ALL_F32" if method == "f32" else f"MOSTLY_{method.upper()}"]
        for method in numbers
    }


def test_sizes_in_the_docs():
    """Of Llama 3.1 8B, bits for each weight and GB: docs/export.md."""
    layer = {
        "attn_q": 4096,
        "attn_k": 1024,
        "attn_v": 1024,
        "attn_output": 4096,
        "ffn_gate": 14336,
        "ffn_up": 14336,
    }
    shapes = {
        "token_embd.weight": (128256, 4096),
        "output.weight": (128256, 4096),
        "output_norm.weight": (4096,),
    }
    for n in range(32):
        shapes |= {f"blk.{n}.{name}.weight": (rows, 4096) for name, rows in layer.items()}
        shapes |= {f"blk.{n}.ffn_down.weight": (4096, 14336)}
        shapes |= {f"blk.{n}.{name}_norm.weight": (4096,) for name in ("attn", "ffn")}
    numbers = sum(map(math.prod, shapes.values()))
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    for method, mixture in MIXTURES.items():
        types = tensor_types(method, shapes, Layout("llama", 32, 32, 8), weighted=mixture.needs_importance)
        size = sum(nbytes(shapes[name], types[name]) for name in shapes)
        cells = next(row for row in rows if f"`{method}`" in row).split("|")
        place = [name for name in re.findall(r"`(\w+)`", cells[1]) if name in MIXTURES].index(method)
        assert cells[2].split(", ")[place].strip() == f"{8 * size / numbers:.2f}", method
        assert cells[3].split(", ")[place].strip() == f"{size / 1e9:.2f}", method


def test_a_row_that_no_block_fills_is_said(caplog):
    with caplog.at_level("INFO"):
        types_of(gguf_cases.MODELS["only the MLP's rows of blocks of 32"], "q4_k_s")
    assert (
        "blk.0.ffn_down.weight is written as Q5_1: its rows of 1056 are no whole blocks of Q5_K."
        in caplog.messages
    )
    assert len(caplog.messages) == 16


@pytest.mark.parametrize("type", TensorType)
def test_sizes_are_those_of_the_gguf_package(type):
    assert (type.block, type.block_bytes) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type.name]]
    assert type == gguf.GGMLQuantizationType[type.name]
