"""An export that cannot be done says why, and leaves no file behind and no older export broken."""

import contextlib
import json
import os
import shutil

import jax
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, normalizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from jaxtune import errors
from jaxtune.export import card
from jaxtune.export.compressed_folder import save_compressed
from jaxtune.loading.checkpoint import Checkpoint
from tests.export.adapted import Adapted
from tests.export.byte_level import VOCAB, byte_level
from tests.kit.disk import files_of_at_most


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("bad"), dtype="bfloat16", num_hidden_layers=1)


@contextlib.contextmanager
def fails(kind, *parts):
    with pytest.raises(kind) as caught:
        yield
    for part in parts:
        assert part in str(caught.value)


class TokenizerOnAFullDisk:
    def save_pretrained(self, folder):
        raise OSError(28, os.strerror(28))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SAVERS = {
    "merged": lambda adapted, folder, **options: adapted.save_merged(folder / "out", **options),
    "fp8": lambda adapted, folder: save_compressed(folder / "out", adapted._trained, scheme="fp8_dynamic"),
    "gguf": lambda adapted, folder, **options: adapted.save_gguf(folder / "out", **options),
}
FOLDERS = {"merged": "out", "fp8": "out", "gguf": "out_gguf"}
each_saver = pytest.mark.parametrize("how", SAVERS)


@each_saver
def test_a_disk_that_fills_up_leaves_nothing(adapted, tmp_path, how):
    with files_of_at_most(100_000), fails(errors.OutputFolderError, FOLDERS[how], "failed"):
        SAVERS[how](adapted, tmp_path)
    assert not list(tmp_path.iterdir())


@each_saver
def test_a_disk_that_fills_up_leaves_the_older_export(adapted, tmp_path, how):
    SAVERS[how](adapted, tmp_path)
    before = contents(tmp_path / FOLDERS[how])
    with files_of_at_most(100_000), fails(errors.OutputFolderError):
        SAVERS[how](adapted, tmp_path)
    assert contents(tmp_path / FOLDERS[how]) == before
    assert [path.name for path in tmp_path.iterdir()] == [FOLDERS[how]]


def test_a_full_disk_is_called_that(adapted, tmp_path):
    with fails(errors.OutputFolderError, "No space left", "Free some space"):
        adapted.save_merged(tmp_path / "out", tokenizer=TokenizerOnAFullDisk())
    assert not list(tmp_path.iterdir())


@each_saver
def test_somebody_elses_folder(adapted, tmp_path, how):
    (tmp_path / FOLDERS[how]).mkdir()
    (tmp_path / FOLDERS[how] / "thesis.tex").write_text("my only copy")
    with fails(errors.OutputFolderError, "thesis.tex", "Choose another folder"):
        SAVERS[how](adapted, tmp_path)
    assert list(contents(tmp_path / FOLDERS[how])) == ["thesis.tex"]
    assert [path.name for path in tmp_path.iterdir()] == [FOLDERS[how]]


@pytest.mark.parametrize("how", ["merged", "packed", "gguf"])
def test_somebody_elses_model(adapted, tmp_path, how):
    """A config.json or a Modelfile does not make it ours; our card does."""
    folder = tmp_path / ("out_gguf" if how == "gguf" else "out")
    folder.mkdir()
    weights = folder / ("theirs.gguf" if how == "gguf" else "model-00001-of-00002.safetensors")
    for file in (weights, folder / "config.json", folder / "Modelfile", folder / "README.md"):
        file.write_text("{}")
    options = {"save_method": "merged_4bit"} if how == "packed" else {}
    save = adapted.model.save_pretrained_gguf if how == "gguf" else adapted.model.save_pretrained_merged
    with fails(errors.OutputFolderError, f"{folder} holds a model ({weights.name})", "Choose another folder"):
        save(tmp_path / "out", **options)
    assert weights.read_text() == "{}" and len(list(folder.iterdir())) == 4
    (folder / "README.md").write_text(card.OURS)
    save(tmp_path / "out", **options)


def test_an_adapter_alone_of_a_model_without_one(tmp_path):
    model = Adapted(tmp_path, adapter=False).model
    with fails(errors.AdapterError, "The model has no adapter", "save_pretrained_merged"):
        model.save_pretrained_merged(tmp_path / "out", save_method="lora")
    assert not (tmp_path / "out").exists()


def test_the_base_is_not_overwritten(adapted):
    before = contents(adapted.base)
    with fails(errors.OutputFolderError, "is the base model itself", "Choose another name"):
        adapted.save_merged(adapted.base)
    assert contents(adapted.base) == before


def test_a_merge_beside_its_adapter(adapted):
    before = contents(adapted.adapter)
    with fails(errors.OutputFolderError, "holds an adapter", "Choose another name"):
        adapted.save_merged(adapted.adapter)
    assert contents(adapted.adapter) == before


@each_saver
def test_a_base_that_is_gone(tmp_path, how):
    adapted = Adapted(tmp_path / "in", num_hidden_layers=1)
    shutil.rmtree(adapted.base)
    with fails(errors.ModelNotFoundError, str(adapted.base)):
        SAVERS[how](adapted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@each_saver
def test_another_base_than_the_adapters(adapted, tmp_path, how):
    other = Adapted(tmp_path / "in", num_hidden_layers=1, intermediate_size=128)
    other.model.lora = adapted.model.lora
    with fails(errors.AdapterError, "model.layers.0.mlp.", "256", "holds it as (128, 128)"):
        SAVERS[how](other, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_quantised_base(adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "dtype", lambda self, name: jax.numpy.dtype("uint8"))
    with fails(errors.CheckpointError, "holds quantised weights", "(uint8)", "original 16-bit model"):
        adapted.save_merged(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@each_saver
def test_a_diverged_adapter(tmp_path, how):
    adapted = Adapted(tmp_path / "in", num_hidden_layers=1)
    adapted.model.lora = jax.tree.map(lambda x: x * float("inf"), adapted.model.lora)
    with fails(errors.AdapterError, "model.layers.0", "float32 cannot hold", "diverged"):
        SAVERS[how](adapted, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("size", ["five", "0GB", "-1MB", 0, "", "GB", "nanGB", "infGB"])
def test_a_shard_size_that_is_none(adapted, tmp_path, size):
    with fails(errors.OptionError, f"max_shard_size={size!r}", '"5GB"'):
        adapted.save_merged(tmp_path / "out", max_shard_size=size)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        ("q8_O", ["'q8_O'", "Did you mean 'q8_0'"]),
        (["f16", "bf61"], ["'bf61'", "Did you mean 'bf16'"]),
        ("q4km", ["Did you mean 'q4_k_m'"]),
        ("int3", ["one of f32, f16, bf16, q8_0, q4_0, ", "quantized, ", "not_quantized"]),
        (["q4_0", "iq2_xs"], ["'iq2_xs' without an importance matrix", "an imatrix_file", "take q2_k"]),
        ([], ["empty list"]),
    ],
)
def test_an_unknown_method(adapted, tmp_path, method, parts):
    with fails(errors.OptionError, *parts):
        adapted.save_gguf(tmp_path / "out", method)
    assert not list(tmp_path.iterdir())


def unigram():
    backend = Tokenizer(tokenizer_models.Unigram([("a", 0.0), ("b", 0.0)], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="a", bos_token="b")


def unreachable_token():
    """With ignore_merges, a token that no merges lead to is found all the same."""
    spec = json.loads(byte_level("gpt-2").backend_tokenizer.to_str())
    spec["model"]["vocab"]["xqzj"] = max(spec["model"]["vocab"].values()) + 5
    spec["model"]["ignore_merges"] = True
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token="a")


def other_bos():
    tokenizer = byte_level("llama-bpe")
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = byte_level("llama-bpe").backend_tokenizer.post_processor
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "parts"),
    [
        (unigram, ["'Unigram', not BPE", "llama.cpp's own converter"]),
        (lambda: byte_level("gpt-2", normalizer=normalizers.NFC()), ["normalises text (NFC)"]),
        (unreachable_token, ["ignore_merges=True", "1 tokens", "'xqzj'"]),
        (other_bos, ["puts the tokens [0] before a text"]),
    ],
)
def test_a_tokenizer_that_gguf_cannot_say(tmp_path, tokenizer, parts):
    adapted = Adapted(tmp_path / "in", adapter=False, num_hidden_layers=1, vocab_size=VOCAB)
    with fails(errors.UnsupportedModelError, *parts):
        adapted.save_gguf(tmp_path / "out", tokenizer=tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_tokenizer_of_a_larger_model(adapted, tmp_path):
    with fails(errors.UnsupportedModelError, "the model embeds 384"):
        adapted.save_gguf(tmp_path / "out", tokenizer=byte_level("gpt-2"))
    assert not list(tmp_path.iterdir())


def test_values_beyond_float16(tmp_path):
    adapted = Adapted(tmp_path / "in", adapter=False, num_hidden_layers=1)
    path = adapted.base / "model.safetensors"
    weights = {name: weight.copy() for name, weight in load_file(path).items()}
    weights["model.layers.0.mlp.up_proj.weight"][-1, -1] = 1e6
    save_file(weights, path)
    with fails(errors.OptionError, "blk.0.ffn_up.weight", "F16 cannot", "1e+06", "bf16"):
        adapted.save_gguf(tmp_path / "out", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_weight_without_a_place(tmp_path):
    adapted = Adapted(tmp_path / "in", num_hidden_layers=2, adapter=False)
    path = adapted.base / "model.safetensors"
    path.write_bytes(
        path.read_bytes().replace(b"model.layers.1.mlp.up_proj.weight", b"model.layers.1.mlp.UP_proj.weight")
    )
    with fails(errors.CheckpointError, "model.layers.1.mlp.UP_proj.weight"):
        adapted.save_gguf(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
