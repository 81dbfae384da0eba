"""PEFT folders travel both ways: what we write, PEFT loads with the same logits, and the reverse."""

import dataclasses
import json

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from jaxtune import FastLanguageModel
from jaxtune.lora import peft_format
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal, relative_rms

IDS = np.random.default_rng(0).integers(5, models.VOCAB, (2, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    theirs = models.random_llama()
    return theirs, models.save(theirs, tmp_path_factory.mktemp("peft") / "base")


def logits(model):
    return np.asarray(model.apply(model.params, model.lora, IDS))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def perturbed(model):
    """B is zero at first, which would hide every mistake."""
    model.lora = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), model.lora
    )
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8},
        {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "down_proj"]},
        {"r": 8, "use_rslora": True},
        {"r": 8, "target_modules": r".*\.self_attn\.(k|v)_proj"},
        {"r": 4, "target_modules": "all-linear"},
    ],
    ids=["seven projections", "two projections, alpha 32", "rslora", "regex", "all-linear"],
)
def test_ours_in_peft(base, tmp_path, settings):
    _, folder = base
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    before = logits(model)
    model = FastLanguageModel.get_peft_model(model, **settings)
    np.testing.assert_array_equal(logits(model), before, err_msg="a fresh adapter changes nothing")
    model = perturbed(model)
    model.save_pretrained(tmp_path / "adapter", tokenizer)

    theirs = peft.PeftModel.from_pretrained(
        models.LlamaForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    assert relative_rms(logits(model), before) > 1e-2, "the adapter must matter for this to show anything"
    assert_close(logits(model), torch_logits(theirs), 1e-4)

    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", dtype="float32", load_in_4bit=False)
    assert_trees_equal(again.lora, model.lora)
    assert again.causal_lm == model.causal_lm


def test_theirs_in_ours(base, tmp_path):
    theirs, folder = base
    config = peft.LoraConfig(
        r=8, lora_alpha=24, target_modules=["q_proj", "v_proj", "gate_proj"], task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(models.LlamaForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    theirs.save_pretrained(tmp_path / "adapter")
    ours, tokenizer = FastLanguageModel.from_pretrained(
        tmp_path / "adapter", dtype="float32", load_in_4bit=False
    )
    assert_close(logits(ours), torch_logits(theirs), 1e-4)
    assert len(tokenizer) == len(models.tokenizer())


def test_the_folder_is_what_peft_writes(base, tmp_path):
    _, folder = base
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    FastLanguageModel.get_peft_model(model, r=4).save_pretrained(tmp_path / "ours")
    seven = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    peft_config = peft.LoraConfig(r=4, target_modules=seven, task_type="CAUSAL_LM")
    peft.get_peft_model(models.LlamaForCausalLM.from_pretrained(folder), peft_config).save_pretrained(
        tmp_path / "peft"
    )

    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "peft"))
    assert {name: a.shape for name, a in ours.items()} == {name: a.shape for name, a in theirs.items()}
    settings = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder)
    peft.LoraConfig.from_pretrained(tmp_path / "ours")


def test_initial_a_is_distributed_as_pefts(base):
    _, folder = base
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    a = FastLanguageModel.get_peft_model(model, r=16).lora["layers"][0][0]["self_attn"]["q_proj"]["a"]
    theirs = torch.nn.Linear(
        128, 16, bias=False
    ).weight.detach()  # PEFT's default is torch's own for a linear
    assert abs(float(abs(a).max()) - 1 / np.sqrt(128)) < 1e-3
    assert abs(float(a.std()) / float(theirs.std()) - 1) < 0.1


def test_seeds_decide_a(base):
    _, folder = base
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    one, same, other = (FastLanguageModel.get_peft_model(model, r=4, random_state=s).lora for s in (1, 1, 2))
    assert_trees_equal(one, same)
    q = [tree["layers"][0][0]["self_attn"]["q_proj"]["a"] for tree in (one, other)]
    assert relative_rms(*q) > 0.1


def test_every_setting_of_peft_is_classified():
    """Read, or refused unless neutral, or without meaning here: a setting that is new in PEFT fails this test."""
    read = {"r", "lora_alpha", "target_modules", "use_rslora", "init_lora_weights"}
    known = read | set(peft_format.UNDERSTOOD_ONLY_AS) | peft_format.IRRELEVANT
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
