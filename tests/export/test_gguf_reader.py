"""A GGUF file that is read is the one that was written; one that is broken says where."""

import struct

import gguf
import numpy as np
import pytest

from jaxtune.errors import CheckpointError
from jaxtune.export.gguf.quants import TensorType, encode
from jaxtune.export.gguf.reader import read_gguf
from jaxtune.export.gguf.writer import TensorInfo, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.small": np.uint8(3),
    "a.count": np.uint32(7),
    "a.far": np.int64(-5),
    "a.share": np.float32(0.1),
    "a.words": ["a", "ü", ""],
    "a.types": np.arange(4, dtype=np.int32),
    "a.scores": np.linspace(0, 1, 3, dtype=np.float32),
}
ARRAYS = {
    "token_embd.weight": (np.random.default_rng(0).standard_normal((3, 64)), TensorType.Q4_0),
    "output_norm.weight": (np.arange(5.0), TensorType.F32),
    "output.weight": (np.ones((2, 3)), TensorType.F16),
}
TENSORS = [TensorInfo(name, array.shape, type) for name, (array, type) in ARRAYS.items()]


def encoded(info):
    return encode(ARRAYS[info.name][0].astype(np.float32), info.type, info.name)


@pytest.fixture
def written(tmp_path):
    write_gguf(tmp_path / "a.gguf", METADATA, TENSORS, encoded)
    return tmp_path / "a.gguf"


def test_it_reads_what_the_writer_wrote(written):
    file = read_gguf(written)
    assert list(file.metadata) == list(METADATA)
    for key, value in METADATA.items():
        found = file.metadata[key]
        assert getattr(found, "dtype", type(found)) == getattr(value, "dtype", type(value)), key
        np.testing.assert_array_equal(found, value)
    assert [tensor.info for tensor in file.tensors.values()] == TENSORS
    for info in TENSORS:
        np.testing.assert_array_equal(file.tensors[info.name].data, encoded(info))
    assert file.tensors["token_embd.weight"].rows.shape == (3, 36)


def test_it_reads_what_the_gguf_package_wrote(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    writer.add_uint32("a.count", 7)
    writer.add_array("a.words", ["a", "ü"])
    writer.add_tensor("x", np.arange(6, dtype=np.float32).reshape(2, 3))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    file = read_gguf(tmp_path / "b.gguf")
    assert file.metadata == {"general.architecture": "llama", "a.count": 7, "a.words": ["a", "ü"]}
    np.testing.assert_array_equal(file.tensors["x"].data.view(np.float32), np.arange(6))
    assert file.tensors["x"].info.shape == (2, 3)


def refused(path, content, said):
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.gguf is not a whole GGUF file: .*{said}"):
        read_gguf(path)


@pytest.mark.parametrize("kept", [3, 20, 100, 300, 480])
def test_a_file_that_breaks_off_before_its_data(written, kept):
    refused(written, written.read_bytes()[:kept], "it ends before its list of tensors does")


def test_a_file_that_breaks_off_in_its_data(written):
    refused(written, written.read_bytes()[:-32], "output.weight lies beyond the end")


def test_a_file_that_is_longer_than_its_tensors(written):
    refused(written, written.read_bytes() + bytes(32), "its tensors end at")


def test_something_else(written):
    refused(written, b"PK" + written.read_bytes()[2:], r"begins with b'PKUF' and version 3")
    refused(written, written.read_bytes()[:0], "empty")
    with pytest.raises(CheckpointError, match="No such file"):
        read_gguf(written.with_name("b.gguf"))


def changed(content, name, offset, form, value):
    """With another number so far behind a tensor's name."""
    at = content.index(name.encode()) + len(name) + offset
    new = struct.pack(form, value)
    return content[:at] + new + content[at + len(new) :]


@pytest.mark.parametrize(
    ("name", "offset", "form", "value", "said"),
    [
        ("output_norm.weight", 12, "<I", 99, "output_norm.weight is of type 99"),
        ("output_norm.weight", 16, "<Q", 64, "output_norm.weight lies not behind the tensor before it"),
        ("output_norm.weight", 4, "<Q", 9, "output.weight lies not behind the tensor before it"),
        ("token_embd.weight", 4, "<Q", 65, "token_embd.weight has rows of 65, no whole blocks of Q4_0"),
        ("a.count", 0, "<I", 77, "of type 77, which GGUF does not have"),
    ],
)
def test_a_list_of_tensors_that_is_wrong(written, name, offset, form, value, said):
    refused(written, changed(written.read_bytes(), name, offset, form, value), said)


def test_a_name_that_comes_twice(written):
    refused(written, written.read_bytes().replace(b"a.small", b"a.count"), "the key a.count twice")
