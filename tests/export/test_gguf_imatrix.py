"""Importance matrices: files as llama-imatrix writes them, and what they change."""

import gguf
import numpy as np
import pytest

from jaxtune.errors import CheckpointError, OptionError
from jaxtune.export.gguf.imatrix import for_tensor, read_imatrix
from jaxtune.export.gguf.quants import TensorType, encode
from tests.export.adapted import Adapted
from tests.export.imatrix import write_dat, write_gguf
from tests.kit.compare import relative_rms

RNG = np.random.default_rng(0)
WIDE = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 2}


def squares(*shape):
    return RNG.chisquare(1, shape).astype(np.float32)


def test_both_forms_are_read(tmp_path):
    sums = {"blk.0.attn_q.weight": squares(1, 64), "blk.0.ffn_down_exps.weight": squares(3, 32)}
    counts = {"blk.0.attn_q.weight": np.asarray([[6.0]], np.float32)}
    counts["blk.0.ffn_down_exps.weight"] = np.asarray([[2.0], [0.0], [4.0]], np.float32)
    found = read_imatrix(write_gguf(tmp_path / "a.gguf", sums, counts))
    np.testing.assert_array_equal(
        found["blk.0.attn_q.weight"], sums["blk.0.attn_q.weight"][0] / np.float32(6)
    )
    experts = sums["blk.0.ffn_down_exps.weight"]
    expected = np.stack([experts[0] / 2, np.ones(32), experts[2] / 4]).astype(np.float32)
    np.testing.assert_array_equal(found["blk.0.ffn_down_exps.weight"], expected)
    older = read_imatrix(write_dat(tmp_path / "a.dat", sums, 3))
    for name, weight in sums.items():
        np.testing.assert_array_equal(older[name], weight.reshape(-1) / np.float32(3))
    assert for_tensor(older, "blk.0.ffn_down_exps.weight", (3, 8, 32)).shape == (3, 32)


def test_experts_have_an_importance_each():
    experts, importance = RNG.standard_normal((3, 8, 256)).astype(np.float32), squares(3, 256)
    apart = [
        encode(expert, TensorType.Q4_K, "x", columns)
        for expert, columns in zip(experts, importance, strict=True)
    ]
    np.testing.assert_array_equal(encode(experts, TensorType.Q4_K, "x", importance), np.concatenate(apart))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("imatrix"), **WIDE)


@pytest.mark.parametrize("method", ["q2_k", "q3_k_m", "q4_k_m", "q5_0", "iq4_xs"])
def test_what_matters_is_kept(adapted, tmp_path, method, caplog):
    """In the columns that matter, the file is nearer to the merged weights for it."""
    name, columns = "blk.1.ffn_up.weight", np.where(np.arange(256) % 8 == 0, 100, 0.01).astype(np.float32)
    file = of_one_token(tmp_path / "x.gguf", name, columns[None])
    exact, plain = adapted.save_gguf(tmp_path / "plain", ["f32", method])
    with caplog.at_level("INFO"):
        (weighted,) = adapted.save_gguf(tmp_path / "weighted", method, imatrix_file=file)
    assert any(
        "importance matrix has nothing for 15 tensors: output.weight, " in line for line in caplog.messages
    )
    exact, plain, weighted = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (exact, plain, weighted)
    )
    lost = [
        relative_rms(
            gguf.quants.dequantize(of[name].data, of[name].tensor_type)[:, ::8], exact[name].data[:, ::8]
        )
        for of in (weighted, plain)
    ]
    assert lost[0] < 0.75 * lost[1]
    assert plain["blk.1.ffn_gate.weight"].data.tobytes() == weighted["blk.1.ffn_gate.weight"].data.tobytes()


def of_one_token(path, name, sums):
    return write_gguf(path, {name: sums}, {name: np.ones((1, 1), np.float32)})


def of_another_model(path):
    return of_one_token(path, "blk.0.attn_q.weight", squares(1, 96))


def with_negative_numbers(path):
    return of_one_token(path, "blk.0.attn_q.weight", -squares(1, 256))


def cut_short(path):
    of_another_model(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def another_file(path):
    path.write_text("this is no importance matrix, but long enough to be one")
    return path


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (of_another_model, r"has 96 numbers for blk\.0\.attn_q\.weight"),
        (with_negative_numbers, r"blk\.0\.attn_q\.weight has numbers that are negative"),
        (cut_short, "is not an importance matrix"),
        (another_file, "is not an importance matrix"),
        (lambda path: path, "is not an importance matrix: .*No such file"),
    ],
)
def test_a_file_that_is_none(adapted, tmp_path, made, message):
    file = made(tmp_path / "imatrix")
    with pytest.raises(CheckpointError, match=message):
        adapted.save_gguf(tmp_path / "out", "q4_k_m", imatrix_file=file)
    assert not (tmp_path / "out_gguf").exists()


def test_a_type_that_cannot_do_without(adapted, tmp_path):
    file = of_one_token(tmp_path / "imatrix", "blk.1.ffn_up.weight", squares(1, 256))
    with pytest.raises(
        OptionError, match=r"blk\.0\.attn_k\.weight is to become IQ2_S, and has no importance"
    ):
        adapted.save_gguf(tmp_path / "out", "iq3_xxs", imatrix_file=file)
    assert not (tmp_path / "out_gguf").exists()
