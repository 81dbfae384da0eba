"""A GGUF file is read back before it bears its name: whatever is wrong with it is seen, and no weights are refused for
what they are."""

from pathlib import Path

import numpy as np
import pytest

from jaxtune.errors import ExportError
from jaxtune.export.gguf import adapter as gguf_adapter
from jaxtune.export.gguf import folder as gguf_folder
from jaxtune.export.gguf.quants import TensorType, decode, encode
from jaxtune.export.gguf.writer import TensorInfo
from jaxtune.export.verify.bounds import BOUNDS, errors
from jaxtune.export.verify.gguf import furthest_off
from tests.export import gguf_cases
from tests.export.adapted import Adapted

DOCS = Path(__file__).parents[2] / "docs" / "export.md"
COLUMNS = 512
every_type = pytest.mark.parametrize("type", TensorType, ids=lambda type: type.name)


def weights(rows=24):
    """As those of models are, and less usual ones."""
    rng = np.random.default_rng(7)
    normal = lambda: rng.standard_normal((rows, COLUMNS))
    outliers = lambda size: np.where(rng.random((rows, COLUMNS)) < 1 / 128, size, 1) * normal()
    columns = lambda size: np.where(np.arange(COLUMNS) % 171 == 0, size, 1) * normal()
    found = {
        "normal": normal(),
        "uniform": rng.uniform(-1, 1, (rows, COLUMNS)),
        "laplace": rng.laplace(size=(rows, COLUMNS)),
        **{f"t, {df} degrees": rng.standard_t(df, (rows, COLUMNS)) for df in (1.5, 3)},
        **{f"outliers, {size} times": outliers(size) for size in (4, 16, 64)},
        **{f"columns, {size} times": columns(size) for size in (4, 16, 64)},
        "columns of all sizes": normal() * np.exp(rng.standard_normal(COLUMNS)),
        "rows of all sizes": normal() * np.exp(2 * rng.standard_normal((rows, 1))),
        "few that are not zero": np.where(rng.random((rows, COLUMNS)) < 0.05, normal(), 0),
        "positive": np.abs(normal()),
        "rows of zeros": np.where(np.arange(rows)[:, None] % 3 == 0, 0, normal()),
        "hardly any": 1e-4 * normal(),
    }
    return {name: (0.03 * x).astype(np.float32) for name, x in found.items()}


def importances(type):
    rng = np.random.default_rng(8)
    measured = (rng.standard_normal(COLUMNS) ** 2 * np.exp(rng.standard_normal(COLUMNS))).astype(np.float32)
    found = {"none": None, "even": np.ones(COLUMNS, np.float32), "measured": measured}
    return {name: each for name, each in found.items() if each is not None or not type.needs_importance}


def share(found, x, type, importance=None):
    """Of the bound, at most."""
    error, bound = errors(found, x, type, importance)
    return np.max(np.divide(error, bound, out=np.where(error > 0, np.inf, 0), where=bound > 0))


@every_type
def test_any_weights_are_within_the_bound(type):
    for how, importance in importances(type).items():
        for name, x in {**weights(), **gguf_cases.rows()}.items():
            found = decode(encode(x, type, "x", importance).reshape(len(x), -1), type)
            assert share(found, x, type, importance) <= 1, (how, name)


def two_blocks_change_places(found, type):
    blocks = found.reshape(-1, type.block)
    return np.concatenate([blocks[1::-1], blocks[2:]]).reshape(found.shape)


MISTAKES = {
    "rows in another order": lambda found, type: np.roll(found, 1, axis=0),
    "rows a block later": lambda found, type: np.roll(found, type.block, axis=1),
    "two blocks change places": two_blocks_change_places,
    "scales twice as large": lambda found, type: 2 * found,
    "no signs": lambda found, type: np.abs(found),
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
@every_type
def test_a_mistake_is_seen(type, mistake):
    importance = importances(type)["even"] if type.needs_importance else None
    for name in ("normal", "t, 3 degrees", "laplace", "outliers, 16 times"):
        x = weights()[name]
        found = decode(encode(x, type, "x", importance).reshape(len(x), -1), type)
        assert share(mistake(found, type), x, type, importance) > 1, name


@pytest.mark.parametrize(("rows", "row"), [(100, 63), (30_000, 0), (30_000, 29_999)])
def test_rows_from_the_first_to_the_last_are_looked_at(rows, row):
    """Of a small tensor all of them."""
    info = TensorInfo("x", (rows, 32), TensorType.Q8_0)
    x = np.random.default_rng(0).standard_normal(info.shape).astype(np.float32)
    blocks = encode(x, info.type, "x")
    assert furthest_off(info, x, None, blocks).share < 1
    blocks.reshape(rows, -1)[row] = blocks.reshape(rows, -1)[row - 1]
    off = furthest_off(info, x, None, blocks)
    assert off.share > 1
    assert off.row == row


def test_experts_have_an_importance_each():
    rng = np.random.default_rng(0)
    info = TensorInfo("x", (3, 2, 256), TensorType.IQ2_XS)
    x = rng.standard_normal(info.shape).astype(np.float32)
    importance = rng.uniform(0.1, 2, (3, 256)).astype(np.float32) ** 4
    blocks = encode(x, info.type, "x", importance)
    assert furthest_off(info, x, importance, blocks).share < 1
    assert furthest_off(info, x, importance, np.roll(blocks.reshape(3, -1), 1, 0)).share > 1


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("verified"), num_hidden_layers=1, dtype="bfloat16")


def test_what_was_compared_is_said(adapted, tmp_path, caplog):
    with caplog.at_level("INFO"):
        adapted.save_gguf(tmp_path / "out", ["q8_0", "f32"])
    said = [line for line in caplog.messages if "read back" in line]
    assert len(said) == 2
    assert said[0].startswith(
        "Tiny-Llama.Q8_0.gguf: read back, 13 tensors as written; values off by at most "
    )
    assert said[1].endswith("tensors as written; values exact.")


def spoiled(monkeypatch, spoil):
    """Files change between writing and reading."""
    write = gguf_folder.write_gguf

    def spoiling(path, *rest):
        write(path, *rest)
        path.write_bytes(spoil(path.read_bytes()))

    monkeypatch.setattr(gguf_folder, "write_gguf", spoiling)


def with_a_bit_flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


FLAWS = {
    "a bit of the last tensor": (lambda data: with_a_bit_flipped(data, -40), "has other bytes than were written"),
    "another key": (lambda data: data.replace(b"llama.rope.freq_base", b"llama.rope.freq_bass"), "of its keys"),
    "another name": (lambda data: data.replace(b"blk.0.ffn_up", b"blk.0.ffn_uq"), "of its tensors, blk.0.ffn_up"),
    "another file type": (
        lambda data: with_a_bit_flipped(data, data.index(b"general.file_type") + 21), "general.file_type"
    ),
}  # fmt: skip


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_file_that_changed_after_it_was_written(adapted, tmp_path, monkeypatch, flaw):
    spoil, said = FLAWS[flaw]
    spoiled(monkeypatch, spoil)
    with pytest.raises(ExportError, match=said):
        adapted.save_gguf(tmp_path / "out", "q8_0")
    assert not list(tmp_path.iterdir()), "what failed bears no name"
    adapted.save_gguf(tmp_path / "out", "q8_0", verify=False)


def turned(array, *rest):
    return encode(array[::-1] if array.ndim > 1 else array, *rest)


@pytest.mark.parametrize("method", ["q8_0", "q4_0", "bf16"])
def test_a_mistake_of_ours(adapted, tmp_path, monkeypatch, method):
    """Written as it was made, but made wrong: the checksum agrees, the values do not."""
    monkeypatch.setattr(gguf_folder, "encode", turned)
    with pytest.raises(ExportError, match=r"of type \w+, is off by .* in row \d+") as caught:
        adapted.save_gguf(tmp_path / "out", method)
    assert "verify=False" in caught.value.fix
    assert not list(tmp_path.iterdir())


def test_an_adapter(adapted, tmp_path, monkeypatch):
    adapted.model.save_pretrained_ggml(tmp_path / "right")
    monkeypatch.setattr(gguf_adapter, "encode", turned)
    with pytest.raises(ExportError, match=r"lora_[ab], of type F16, is off by"):
        adapted.model.save_pretrained_ggml(tmp_path / "wrong")
    assert [path.name for path in tmp_path.iterdir()] == ["right"]
    adapted.model.save_pretrained_ggml(tmp_path / "wrong", verify=False)


def test_bounds_in_the_docs():
    """Of every type, with the worst that was found, which is within it."""
    rows = [
        line.split("|")[1:-1]
        for line in DOCS.read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    cells = [row[n : n + 3] for row in rows if len(row) == 9 for n in (0, 3, 6)]
    said = {
        name.strip(): (bound, worst) for name, bound, worst in cells if name.strip() in TensorType.__members__
    }
    assert said.keys() == {type.name for type in BOUNDS if type.block > 1}
    for name, (bound, worst) in said.items():
        assert float(bound) == BOUNDS[TensorType[name]].error
        assert 0.7 < float(worst) / float(bound) < 0.9
    assert set(BOUNDS) == set(TensorType)
