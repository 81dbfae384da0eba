"""Export through the names that users know, from a model that was trained in 4 bits."""

import json

import jax
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.errors import ModelNotFoundError, OptionError
from tests.export.imatrix import write_gguf
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal, relative_rms

IDS = np.random.default_rng(0).integers(5, 300, (1, 20)).astype(np.int32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A 4-bit model with an adapter that is awake, and the 16-bit base it came from."""
    folder = models.save(models.random_llama(), tmp_path_factory.mktemp("methods") / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    rng = np.random.default_rng(1)
    model.lora = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape).astype(np.float32), model.lora
    )
    return model, FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)[0]


def test_merged_is_the_original_base_plus_the_adapter(trained, tmp_path):
    """Not the 4-bit base: that differs, and the test would see it."""
    model, base = trained
    model.save_pretrained_merged(tmp_path / "merged", models.tokenizer())
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(IDS).long()).logits.numpy()
    assert_close(logits, model.causal_lm.apply(base.params, model.lora, IDS), 1e-4)
    assert relative_rms(logits, model.apply(model.params, model.lora, IDS)) > 1e-2


def test_a_head_that_was_trained_apart_from_the_embedding(tmp_path):
    """Merged in 4 bits it is the 16-bit merge loaded in 4 bits, and neither is tied any more."""
    folder = models.save(models.random_llama(tie_word_embeddings=True), tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["lm_head"])
    model.lora["lm_head"] = jax.tree.map(lambda x: x + 1, model.lora["lm_head"])
    loaded = []
    for method in ("merged_4bit", "merged_16bit"):
        model.save_pretrained_merged(tmp_path / method, tokenizer, save_method=method)
        loaded.append(FastLanguageModel.from_pretrained(tmp_path / method, dtype="float32")[0])
    assert "lm_head" in loaded[0].params
    assert_trees_equal(loaded[0].params, loaded[1].params)


def test_gguf_and_modelfile(trained, tmp_path):
    files = trained[0].save_pretrained_gguf(tmp_path / "model", quantization_method=["q8_0", "f32"])
    assert all(file.is_file() for file in files)
    assert {file.suffix for file in files} >= {".gguf"}
    assert (tmp_path / "model_gguf" / "Modelfile").is_file()


def test_an_importance_matrix(trained, tmp_path):
    """Of some methods it is asked for; it changes what others write."""
    save = trained[0].save_pretrained_gguf
    with pytest.raises(OptionError, match="imatrix_file"):
        save(tmp_path / "a", quantization_method="iq2_xs")
    sums = {"blk.0.attn_v.weight": np.arange(128, dtype=np.float32)[None]}
    counts = {"blk.0.attn_v.weight": np.ones((1, 1), np.float32)}
    file = write_gguf(tmp_path / "importance.gguf", sums, counts)
    (plain,), (weighted,) = (
        save(tmp_path / name, quantization_method="q5_0", imatrix_file=given)
        for name, given in (("a", None), ("b", file))
    )
    assert plain.read_bytes() != weighted.read_bytes()


def test_the_adapter_alone(trained, tmp_path):
    trained[0].save_pretrained_merged(tmp_path / "lora", save_method="lora")
    assert (tmp_path / "lora" / "adapter_config.json").is_file()


@pytest.mark.parametrize("method", ["fp8", "w8a16"])
def test_a_compressed_merge(trained, tmp_path, method):
    trained[0].save_pretrained_merged(tmp_path / method, save_method=method)
    settings = json.loads((tmp_path / method / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["config_groups"]["group_0"]["weights"]["type"] == {"fp8": "float", "w8a16": "int"}[method]


def test_a_model_without_an_adapter_is_saved_as_it_is(trained, tmp_path):
    """As transformers would: here in 16 or 32 bits, and so the very checkpoint; packed ones are bitsandbytes'."""
    _, base = trained
    base.save_pretrained(tmp_path / "whole", models.tokenizer())
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "whole", dtype="float32", load_in_16bit=True)
    assert_trees_equal(again.params, base.params)


def test_a_base_that_is_gone(trained, tmp_path):
    import dataclasses

    lost = dataclasses.replace(trained[0], name_or_path=str(tmp_path / "moved"))
    for save in (lost.save_pretrained_merged, lost.save_pretrained_gguf):
        with pytest.raises(ModelNotFoundError, match=r"original 16-bit weights, and .*moved"):
            save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_method(trained, tmp_path):
    """Said before the base is looked for."""
    import dataclasses

    lost = dataclasses.replace(trained[0], name_or_path=str(tmp_path / "moved"))
    with pytest.raises(OptionError, match="'merged_16bit'"):
        lost.save_pretrained_merged(tmp_path / "out", save_method="merged_16bits")
    with pytest.raises(OptionError, match="Did you mean 'q8_0'"):
        lost.save_pretrained_gguf(tmp_path / "out", quantization_method="q8")
    with pytest.raises(OptionError, match="'iq1_s' without an importance matrix"):
        lost.save_pretrained_gguf(tmp_path / "out", quantization_method=["f16", "iq1_s"])
