"""How an adapter begins, through the names that users know."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.numpy import load_file

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from jaxtune.errors import AdapterError, OptionError
from jaxtune.lora.tree import linears
from tests.kit import models
from tests.kit.compare import assert_close, relative_rms

IDS = np.random.default_rng(0).integers(5, models.VOCAB, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    theirs = models.random_llama(
        num_hidden_layers=3, hidden_size=64, intermediate_size=128, num_attention_heads=4
    )
    return models.save(theirs, tmp_path_factory.mktemp("init") / "base")


@pytest.fixture(scope="module")
def wide(folder):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)[0]


@pytest.fixture(scope="module")
def packed(folder):
    return FastLanguageModel.from_pretrained(folder, dtype="float32")[0]


def attention(model):
    return model.lora["layers"][0][0]["self_attn"]


def config(model):
    return model.causal_lm.lora_config


def test_gaussian_has_pefts_deviation(wide):
    """1 / r, of each layer's own rank."""
    settings = {"r": 32, "rank_pattern": {"0.self_attn.q_proj": 16}, "init_lora_weights": "gaussian"}
    a = np.asarray(attention(FastLanguageModel.get_peft_model(wide, **settings))["q_proj"]["a"])
    assert abs(a[0, :16].std() * 16 - 1) < 0.1
    assert abs(a[1].std() * 32 - 1) < 0.1
    np.testing.assert_array_equal(a[0, 16:], 0)


def test_awake_is_uniform_in_both_as_pefts(wide):
    q = attention(FastLanguageModel.get_peft_model(wide, r=16, init_lora_weights=False))["q_proj"]
    for factor, inputs in (("a", 64), ("b", 16)):
        theirs = torch.nn.Linear(inputs, 1024, bias=False).weight.detach()
        assert abs(float(q[factor].std()) / float(theirs.std()) - 1) < 0.1
        assert float(abs(q[factor]).max()) <= float(theirs.abs().max()) * 1.01


def test_seeds_decide_a(wide):
    one, same, other = (
        attention(FastLanguageModel.get_peft_model(wide, r=4, random_state=seed))["q_proj"]["a"]
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert relative_rms(one, other) > 0.1


def test_initial_a_is_distributed_as_pefts(wide):
    a = attention(FastLanguageModel.get_peft_model(wide, r=16))["q_proj"]["a"]
    theirs = torch.nn.Linear(64, 16, bias=False).weight.detach()  # PEFT's default is torch's own for a linear
    assert abs(float(abs(a).max()) - 1 / np.sqrt(64)) < 1e-3
    assert abs(float(a.std()) / float(theirs.std()) - 1) < 0.1


def test_an_embedding_begins_as_pefts(wide):
    """Its A, of one-hot inputs, is zero, its B normal; both are normal where they begin awake."""
    fresh, awake = (
        FastLanguageModel.get_peft_model(
            wide, r=16, target_modules=r"model\.embed_tokens", init_lora_weights=init
        ).lora["embed_tokens"]
        for init in (True, False)
    )
    np.testing.assert_array_equal(fresh["b"], 0)
    for normal in (fresh["a"], awake["a"], awake["b"]):
        assert abs(float(normal.mean())) < 0.1
        assert abs(float(normal.std()) - 1) < 0.1


def test_the_last_layers(wide):
    model = FastLanguageModel.get_peft_model(wide, target_modules="all-linear", finetune_last_n_layers=2)
    assert config(model).layers_to_transform == (1, 2)
    assert len(config(model).target_modules) == 7
    ranks = [config(model).rank_of(f"model.layers.{i}.mlp.up_proj") for i in range(3)]
    assert ranks == [0, 16, 16]


def test_embedding_and_head_among_the_targets_are_trained_whole(wide):
    """As in Unsloth."""
    model = FastLanguageModel.get_peft_model(wide, target_modules=["q_proj", "lm_head", "embed_tokens"])
    assert config(model).modules_to_save == ("embed_tokens", "lm_head")
    assert config(model).target_modules == ("q_proj",)
    np.testing.assert_array_equal(model.lora["lm_head"]["weight"], wide.params["lm_head"]["weight"])


@pytest.fixture(scope="module")
def loftq(packed):
    settings = {"r": 16, "lora_alpha": 8, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1}}
    return FastLanguageModel.get_peft_model(packed, **settings)


def test_loftq_is_the_main_part_of_what_packing_lost(loftq, folder):
    """By PEFT's own decomposition, and so that it is that part once it is scaled; the output comes nearer."""
    original = load_file(folder / "model.safetensors")
    for path, _ in linears(loftq.params):
        ab, stack = loftq.lora, loftq.params
        for key in path:
            ab, stack = ab[key], stack[key]
        for i, name in enumerate(loftq.module_names(path)):
            lost = original[f"{name}.weight"] - np.asarray(stack["weight"].dequantize()[i])
            best = _low_rank_decomposition(torch.from_numpy(lost), 16)
            assert_close(0.5 * ab["b"][i] @ ab["a"][i], (best["L"] @ best["R"]).numpy(), 1e-4, name)


def test_loftq_brings_the_output_nearer_to_the_original(loftq, packed, wide):
    logits = [np.asarray(model.apply(model.params, model.lora, IDS)) for model in (loftq, packed, wide)]
    assert relative_rms(logits[0], logits[2]) < 0.9 * relative_rms(logits[1], logits[2])


def test_loftq_is_plain_lora_to_peft_and_is_not_merged(loftq, tmp_path):
    loftq.save_pretrained(tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert settings["init_lora_weights"] is True
    with pytest.warns(UserWarning, match="loftq_config"):
        assert peft.LoraConfig.from_pretrained(tmp_path / "adapter").init_lora_weights is True
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "adapter", dtype="float32")
    assert again.causal_lm == loftq.causal_lm
    for model in (loftq, again):
        with pytest.raises(AdapterError, match="'loftq'"):
            model.save_pretrained_merged(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_loftq_wants_a_packed_base(wide):
    with pytest.raises(AdapterError, match="not in 4 bits"):
        FastLanguageModel.get_peft_model(wide, init_lora_weights="loftq")


def test_a_sketched_pissa_is_a_whole_one(wide):
    """Which whoever loads the adapter can find again."""
    whole, sketched = (
        FastLanguageModel.get_peft_model(wide, r=4, init_lora_weights=how)
        for how in ("pissa", "pissa_niter_4")
    )
    assert sketched.causal_lm == whole.causal_lm
    jax.tree.map(np.testing.assert_array_equal, sketched.lora, whole.lora)


def test_pissa_leaves_no_reference(wide):
    model = FastLanguageModel.get_peft_model(wide, r=4, init_lora_weights="pissa")
    with pytest.raises(OptionError, match=r"beta=0\.1 .*'pissa'"):
        GRPOTrainer(model, lambda **_: [], GRPOConfig(beta=0.1), train_dataset=[{"prompt": "the fox"}])


@pytest.mark.parametrize(("dropout", "seed"), [(0.1, 11), (0.0, None)])
def test_a_trainer_drops_by_its_seed(wide, monkeypatch, dropout, seed):
    model = FastLanguageModel.get_peft_model(wide, r=4, lora_dropout=dropout)
    given = []

    def make_step(*arguments):
        given.extend(arguments)
        raise InterruptedError

    monkeypatch.setattr("jaxtune.training.trainer.make_step", make_step)
    with pytest.raises(InterruptedError):
        SFTTrainer(model, SFTConfig(max_steps=1, seed=11), train_dataset=[{"text": "the fox"}]).train()
    assert given[4] == seed
