"""Opening a folder of safetensors: what is on disk comes back bit for bit, and nothing broken is opened."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save, save_file

from jaxtune.errors import CheckpointError, ModelNotFoundError
from jaxtune.loading.checkpoint import Checkpoint, read_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def write_raw(path: Path, entries: dict[str, tuple[str, list[int], bytes]], *, extra: bytes = b"") -> None:
    """A safetensors file from (dtype as the format spells it, shape, bytes), laid end to end without alignment."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in entries.items():
        offsets = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += content
    write_header(path, json.dumps(header).encode(), data + extra)


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": np.arange(6, dtype=np.float32)}, tmp_path / SHARDS[0])
    save_file({"b": np.arange(4, dtype=np.int8), "c": np.ones((2, 3), np.float16)}, tmp_path / SHARDS[1])
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    return tmp_path


def open_error(folder: Path) -> CheckpointError:
    """The error that opening the folder raises, which says what was found, expected, and what to do."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    return caught.value


class TestReading:
    @pytest.mark.parametrize(
        "name, dtype",
        [
            ("BOOL", np.bool_),
            ("U8", np.uint8),
            ("I64", np.int64),
            ("F16", np.float16),
            ("F32", np.float32),
            ("F64", np.float64),
            ("BF16", ml_dtypes.bfloat16),
            ("F8_E4M3", ml_dtypes.float8_e4m3fn),
            ("F8_E5M2", ml_dtypes.float8_e5m2),
            ("F8_E8M0", ml_dtypes.float8_e8m0fnu),
        ],
    )
    def test_every_dtype_comes_back_bit_for_bit(self, name: str, dtype: Any, tmp_path: Path):
        values = np.arange(6).reshape(2, 3).astype(dtype)
        write_raw(tmp_path / SINGLE, {"w": (name, [2, 3], values.tobytes())})
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.dtype("w") == np.dtype(dtype)
            assert checkpoint.shape("w") == (2, 3)
            assert checkpoint.read("w").tobytes() == values.tobytes()

    def test_what_safetensors_writes_is_read(self, tmp_path: Path):
        weights = {"x.weight": np.random.default_rng(0).normal(size=(5, 7)), "x.bias": np.arange(7)}
        save_file(weights, tmp_path / SINGLE)
        with Checkpoint(tmp_path) as checkpoint:
            assert checkpoint.names == set(weights)
            assert "x.bias" in checkpoint and "y" not in checkpoint
            for name, weight in weights.items():
                np.testing.assert_array_equal(checkpoint.read(name), weight)

    def test_shards_are_one_checkpoint(self, sharded: Path):
        with Checkpoint(sharded) as checkpoint:
            assert list(checkpoint.names) == ["a", "b", "c"]
            np.testing.assert_array_equal(checkpoint.read("a"), np.arange(6, dtype=np.float32))
            np.testing.assert_array_equal(checkpoint.read("c"), np.ones((2, 3), np.float16))

    def test_an_index_may_name_one_shard_of_any_name(self, tmp_path: Path):
        save_file({"a": np.zeros(3)}, tmp_path / "weights.safetensors")
        write_index(tmp_path, {"a": "weights.safetensors"})
        assert Checkpoint(tmp_path).names == {"a"}

    def test_the_single_file_wins_over_an_index_as_in_transformers(self, sharded: Path):
        save_file({"only": np.zeros(1)}, sharded / SINGLE)
        assert Checkpoint(sharded).names == {"only"}

    def test_scalars_and_empty_tensors(self, tmp_path: Path):
        save_file({"scalar": np.array(3.5), "empty": np.zeros((0, 4), np.float32)}, tmp_path / SINGLE)
        checkpoint = Checkpoint(tmp_path)
        assert checkpoint.read("scalar").shape == () and checkpoint.read("scalar") == 3.5
        assert checkpoint.read("empty").shape == (0, 4)

    def test_a_tensor_after_an_odd_sized_one_is_read_aligned(self, tmp_path: Path):
        values = np.arange(4, dtype=np.float32)
        entries = {"odd": ("U8", [1], b"\x07"), "w": ("F32", [4], values.tobytes())}
        write_raw(tmp_path / SINGLE, entries)
        read = Checkpoint(tmp_path).read("w")
        assert read.flags.aligned
        np.testing.assert_array_equal(read, values)

    def test_a_read_copies_nothing_and_cannot_be_written_to(self, tmp_path: Path):
        save_file({"w": np.arange(8, dtype=np.float32)}, tmp_path / SINGLE)
        checkpoint = Checkpoint(tmp_path)
        read = checkpoint.read("w")
        assert np.shares_memory(read, checkpoint.read("w"))
        with pytest.raises(ValueError, match="read-only"):
            read[0] = 1

    def test_arrays_outlive_the_checkpoint_and_a_closed_one_reads_no_more(self, tmp_path: Path):
        save_file({"w": np.arange(8, dtype=np.float32)}, tmp_path / SINGLE)
        with Checkpoint(tmp_path) as checkpoint:
            read = checkpoint.read("w")
        assert read.sum() == 28
        with pytest.raises(CheckpointError, match="closed"):
            checkpoint.read("w")

    def test_an_unknown_name_is_answered_with_the_nearest(self, tmp_path: Path):
        save_file({"model.norm.weight": np.zeros(1)}, tmp_path / SINGLE)
        with pytest.raises(CheckpointError, match=re.escape("Did you mean 'model.norm.weight'?")):
            Checkpoint(tmp_path).read("model.norm.wieght")


class TestOneFile:
    def test_every_tensor_of_a_file_of_any_name_is_read(self, tmp_path: Path):
        weights = {"a.lora_A.weight": np.ones((2, 3), np.float32), "a.lora_B.weight": np.zeros((3, 2))}
        save_file(weights, tmp_path / "adapter_model.safetensors")
        read = read_file(tmp_path / "adapter_model.safetensors")
        assert read.keys() == weights.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(read[name], weight)

    def test_a_truncated_one_is_refused(self, tmp_path: Path):
        path = tmp_path / "adapter_model.safetensors"
        path.write_bytes(save({"a": np.zeros(4)})[:-1])
        with pytest.raises(CheckpointError, match="truncated"):
            read_file(path)


class TestNoWeights:
    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(ModelNotFoundError, match="no folder"):
            Checkpoint(tmp_path / "gone")

    def test_an_empty_folder(self, tmp_path: Path):
        assert "holds no weights; it holds nothing" in open_error(tmp_path).found

    @pytest.mark.parametrize("pickle", ["pytorch_model.bin", "consolidated.00.pth", "last.ckpt", "model.pt"])
    def test_pickles_are_refused_with_the_reason_and_a_way_out(self, pickle: str, tmp_path: Path):
        (tmp_path / pickle).write_bytes(b"")
        error = open_error(tmp_path)
        assert pickle in error.found
        assert "run code" in error.expected
        assert "save_pretrained" in error.fix

    def test_gguf_is_not_for_training(self, tmp_path: Path):
        (tmp_path / "tiny-Q4_K_M.gguf").write_bytes(b"GGUF")
        assert "GGUF" in open_error(tmp_path).found

    def test_shards_without_an_index(self, sharded: Path):
        (sharded / INDEX).unlink()
        error = open_error(sharded)
        assert SHARDS[0] in error.found and INDEX in error.fix

    def test_a_file_without_tensors(self, tmp_path: Path):
        (tmp_path / SINGLE).write_bytes(save({}))
        assert "no tensor at all" in open_error(tmp_path).found


class TestBrokenIndex:
    def test_a_missing_shard_is_named(self, sharded: Path):
        (sharded / SHARDS[1]).unlink()
        error = open_error(sharded)
        assert "1 of 2 shards are missing" in error.found and SHARDS[1] in error.found

    def test_a_tensor_that_is_not_in_its_shard_is_named(self, sharded: Path):
        write_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1]})
        error = open_error(sharded)
        assert "'b'" in error.found and SHARDS[0] in error.found

    @pytest.mark.parametrize(
        "text, problem",
        [
            ('{"weight_map": {"a": ', "cannot be read as JSON"),
            ("[]", "no `weight_map`"),
            ('{"weight_map": ["a"]}', "no `weight_map`"),
            ('{"weight_map": {"a": 1}}', "places 'a' in 1"),
            ('{"weight_map": {"a": "../other/model.safetensors"}}', "no file name in this folder"),
        ],
    )
    def test_an_index_of_the_wrong_form(self, text: str, problem: str, tmp_path: Path):
        (tmp_path / INDEX).write_text(text)
        assert problem in open_error(tmp_path).found


class TestBrokenFile:
    @pytest.mark.parametrize("kept", [0, 5, 20, -1])
    def test_a_truncated_shard_is_named(self, kept: int, sharded: Path):
        shard = sharded / SHARDS[1]
        shard.write_bytes(shard.read_bytes()[:kept])
        error = open_error(sharded)
        assert SHARDS[1] in error.found and "truncated" in error.found

    def test_bytes_beyond_the_end(self, tmp_path: Path):
        write_raw(tmp_path / SINGLE, {"w": ("U8", [2], b"ab")}, extra=b"c")
        assert "longer than its header says" in open_error(tmp_path).found

    def test_a_git_lfs_pointer(self, tmp_path: Path):
        (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
        error = open_error(tmp_path)
        assert "Git LFS pointer" in error.found and "git lfs pull" in error.fix

    @pytest.mark.parametrize(
        "content, problem",
        [
            (b"<!DOCTYPE html><html>Not Found</html>", "is no safetensors file"),
            (struct.pack("<Q", 4) + b"{\xff}}", "header that is no JSON"),
            (struct.pack("<Q", 2) + b"[]", "no JSON object"),
        ],
    )
    def test_a_file_that_is_something_else(self, content: bytes, problem: str, tmp_path: Path):
        (tmp_path / SINGLE).write_bytes(content)
        assert problem in open_error(tmp_path).found

    @pytest.mark.parametrize(
        "entries, problem",
        [
            ({"w": {"dtype": "U8", "shape": [2]}}, "malformed header entry for 'w'"),
            ({"w": 3}, "malformed header entry for 'w'"),
            ({"w": {"dtype": "U8", "shape": [3], "data_offsets": [0, 2]}}, "wrong for U8 [3]"),
            ({"w": {"dtype": "U8", "shape": [-2], "data_offsets": [2, 0]}}, "wrong for U8 [-2]"),
            ({"w": {"dtype": "U8", "shape": [1], "data_offsets": [1, 2]}}, "overlap or leave gaps"),
            ({"w": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}, "has the dtype 'F4'"),
        ],
    )
    def test_a_header_that_contradicts_itself(self, entries: dict[str, Any], problem: str, tmp_path: Path):
        write_header(tmp_path / SINGLE, json.dumps(entries).encode(), b"ab")
        assert problem in open_error(tmp_path).found

    def test_a_link_to_a_file_that_is_gone(self, tmp_path: Path):
        (tmp_path / SINGLE).symlink_to(tmp_path / "blob")
        assert "cannot be read: No such file" in open_error(tmp_path).found
