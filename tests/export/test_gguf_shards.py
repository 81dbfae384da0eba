"""A GGUF in several files: llama.cpp finds them all by the first."""

import numpy as np
import pytest

from jaxtune.errors import OptionError
from jaxtune.export.gguf.reader import read_gguf
from tests.export.adapted import IDS, Adapted
from tests.export.llama_cpp import LlamaCpp
from tests.kit import models

PRINTABLE = models.tokenizer().convert_tokens_to_ids("b")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("shards"))


def next_logits(file):
    return LlamaCpp(file).next_logits(IDS[0, :20].tolist(), models.VOCAB, PRINTABLE)


def test_llama_cpp_reads_them_as_it_reads_one(adapted, tmp_path):
    (whole,) = adapted.save_gguf(tmp_path / "whole")
    files = adapted.save_gguf(tmp_path / "shards", max_shard_size="500KB")
    assert [file.name for file in files] == [
        f"Tiny-Llama.F32-{n:05d}-of-{len(files):05d}.gguf" for n in range(1, 5)
    ]
    np.testing.assert_array_equal(next_logits(files[0]), next_logits(whole))


def test_what_they_hold_together(adapted, tmp_path):
    (whole,) = map(read_gguf, adapted.save_gguf(tmp_path / "whole"))
    files = [read_gguf(file) for file in adapted.save_gguf(tmp_path / "shards", max_shard_size="500KB")]
    together = {name: tensor for file in files for name, tensor in file.tensors.items()}
    assert list(together) == list(whole.tensors)
    assert all(np.array_equal(together[name].data, tensor.data) for name, tensor in whole.tensors.items())
    sizes = [sum(tensor.info.nbytes for tensor in file.tensors.values()) for file in files]
    assert max(sizes) <= 500_000
    for n, file in enumerate(files):
        keys = {"split.no": n, "split.count": len(files), "split.tensors.count": len(together)}
        assert {key: file.metadata[key] for key in keys} == keys
        assert len(file.metadata) == len(keys) + (len(whole.metadata) if n == 0 else 0)
        assert file.metadata["split.no"].dtype == file.metadata["split.count"].dtype == np.uint16


def test_what_fits_into_one_file_is_one(adapted, tmp_path):
    (file,) = adapted.save_gguf(tmp_path / "out", max_shard_size="5GB")
    assert file.name == "Tiny-Llama.F32.gguf"
    assert "split.count" not in read_gguf(file).metadata


def test_ollama_is_told_how_to_make_them_one(adapted, tmp_path, caplog):
    first, *_ = adapted.save_gguf(tmp_path / "out", max_shard_size="500KB")
    command = f"llama-gguf-split --merge {first.name} Tiny-Llama.F32.gguf"
    assert (
        f"Ollama does not read a model that is in several files. To make it one: {command}" in caplog.messages
    )
    comment, source, *_ = (first.parent / "Modelfile").read_text().splitlines()
    assert comment.startswith("# ")
    assert comment.endswith(command)
    assert source == "FROM ./Tiny-Llama.F32.gguf"


def test_other_shards_of_the_same_method_are_replaced(adapted, tmp_path):
    for size in ("500KB", "800KB", None):
        files = adapted.save_gguf(tmp_path / "out", ["f32", "q8_0"], max_shard_size=size)
        assert {path.name for path in (tmp_path / "out_gguf").glob("*.gguf")} == {file.name for file in files}


def test_a_size_that_is_none(adapted, tmp_path):
    with pytest.raises(OptionError, match="max_shard_size='many'"):
        adapted.save_gguf(tmp_path / "out", max_shard_size="many")
