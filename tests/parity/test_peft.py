"""PEFT folders travel both ways, whatever the settings: what we write, PEFT loads with the same logits and gradients,
and merges as we do; what PEFT writes, we load. One table of settings, which go by the same names on both sides."""

import copy
import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.errors import AdapterError
from jaxtune.kernels.linear_cross_entropy import linear_cross_entropy, product
from jaxtune.lora import peft_format
from jaxtune.lora.tree import modules, with_settings
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal, relative_rms

IDS = np.random.default_rng(0).integers(5, models.VOCAB, (2, 24)).astype(np.int32)
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4)
QV = ["q_proj", "v_proj"]
RANKS = {"r": 4, "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.up_proj": 2}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "seven projections": ("plain", {"r": 8}),
    "rslora": ("plain", {"use_rslora": True}),
    "regex": ("plain", {"target_modules": r".*\.self_attn\.(k|v)_proj"}),
    "regex that names layers": (
        "plain",
        {"target_modules": r"model\.layers\.0\.mlp\.up_proj|model\.layers\.[12]\.self_attn\.q_proj"},
    ),
    "all-linear": ("plain", {"target_modules": "all-linear"}),
    "excluded": ("plain", {"exclude_modules": ["up_proj", "layers.0.self_attn.q_proj"]}),
    "ranks by pattern": ("plain", RANKS),
    "alphas by pattern": ("plain", {"alpha_pattern": {r"layers\.2\.self_attn\..*": 48, "up_proj": 4}}),
    "ranks and alphas, rslora": ("plain", {**RANKS, "use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
    "the first pattern holds": ("plain", {"r": 4, "rank_pattern": {r".*q_proj": 6, "1.self_attn.q_proj": 2}}),
    "two layers of three": ("plain", {"layers_to_transform": [0, 2]}),
    "one layer, by its pattern": ("plain", {"layers_to_transform": 1, "layers_pattern": "layers"}),
    "a whole head": ("plain", {"target_modules": QV, "modules_to_save": ["lm_head"]}),
    "a whole embedding": ("plain", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "both whole, tied": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "a whole embedding, tied": ("tied", {"target_modules": QV, "modules_to_save": ["embed_tokens"]}),
    "a low-rank head": ("plain", {"target_modules": r".*\.q_proj|lm_head"}),
    "a low-rank embedding": ("plain", {"target_modules": r".*(q_proj|embed_tokens)", "r": 4}),
    "both low-rank, by rank and alpha, rslora": (
        "plain",
        {
            "target_modules": r".*(q_proj|embed_tokens|lm_head)", "use_rslora": True,
            "rank_pattern": {"embed_tokens": 3, "lm_head": 5}, "alpha_pattern": {"lm_head": 7, "embed_tokens": 4},
        },
    ),
    "a low-rank head, dropped": (
        "plain",
        {"target_modules": r".*(q_proj|embed_tokens|lm_head)", "lora_dropout": 0.5},
    ),
    "a low-rank head, tied": ("tied", {"target_modules": r".*v_proj|lm_head"}),
    "a low-rank embedding, tied": ("tied", {"target_modules": r"model\.embed_tokens", "init_lora_weights": False}),
    "both low-rank, tied": ("tied", {"target_modules": r".*(embed_tokens|lm_head)"}),
    "a whole embedding, a low-rank head, tied": (
        "tied",
        {"target_modules": r".*(v_proj|embed_tokens|lm_head)", "modules_to_save": ["embed_tokens"]},
    ),
    "a whole head, a low-rank embedding": (
        "plain",
        {"target_modules": r".*(v_proj|embed_tokens)", "modules_to_save": ["lm_head"]},
    ),
    "both whole, still tied": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "a whole head, still tied": (
        "tied",
        {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "tying what is not tied": (
        "plain",
        {"target_modules": QV, "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "dora": ("biased", {"use_dora": True}),
    "dora in two layers, by rank": ("plain", {**RANKS, "use_dora": True, "layers_to_transform": [1, 2]}),
    "biases of the adapted": ("biased", {"target_modules": QV, "bias": "lora_only", "layers_to_transform": 1}),
    "all biases": ("biased", {"target_modules": QV, "bias": "all"}),
    "gaussian": ("plain", {"init_lora_weights": "gaussian"}),
    "awake": ("plain", {"init_lora_weights": False}),
    "pissa": ("plain", {"r": 4, "lora_alpha": 12, "init_lora_weights": "pissa"}),
    "pissa in a layer, by rank, with dora": (
        "plain",
        {**RANKS, "init_lora_weights": "pissa", "layers_to_transform": 1, "use_dora": True},
    ),
    "dropout": ("plain", {"lora_dropout": 0.5}),
    "everything": (
        "biased",
        {
            **RANKS, "target_modules": ["q_proj", "o_proj", "up_proj"], "alpha_pattern": {"o_proj": 5},
            "layers_to_transform": [0, 1], "use_dora": True, "use_rslora": True, "bias": "all",
            "modules_to_save": ["embed_tokens", "lm_head"], "lora_dropout": 0.25,
        },
    ),
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*tie_word_embeddings=True.*:UserWarning"
    ),  # that both are trained apart
    pytest.mark.filterwarnings("ignore:.*no tied modules were found:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


class Case:
    """A base with the settings of one case, on both sides."""

    def __init__(self, name, bases):
        base, settings = CASES[name]
        self.name, self.folder, self.base = name, *bases(base)
        self.settings = {"target_modules": SEVEN, "r": 8, "lora_alpha": 16, **settings}

    @functools.cached_property
    def fresh(self):
        return FastLanguageModel.get_peft_model(self.base, **self.settings)

    @functools.cached_property
    def ours(self):
        """Awake: B is zero at first, which would hide every mistake."""
        rng = np.random.default_rng(0)
        noise = jax.tree.map(lambda x: 0.05 * rng.standard_normal(x.shape).astype("float32"), self.fresh.lora)
        noise = self.tree(self.tensors(noise))
        return dataclasses.replace(self.fresh, lora=jax.tree.map(np.add, self.fresh.lora, noise))

    def tensors(self, tree):
        """As a file has them: without padding."""
        config, names = self.fresh.causal_lm.lora_config, self.fresh.module_names
        return dict(peft_format.to_tensors(tree, config, names))

    def tree(self, tensors):
        """As a tree: with padding of zeros."""
        lm, names = self.fresh.causal_lm, self.fresh.module_names
        return peft_format.from_tensors(tensors, lm.lora_config, lm.skeleton, names, "a test")

    def torch_base(self):
        return AutoModelForCausalLM.from_pretrained(self.folder)

    @functools.cached_property
    def theirs(self):
        """An adapter that PEFT has made, awake."""
        given = copy.deepcopy(self.settings)  # PEFT changes lists
        settings = peft.LoraConfig(**given, task_type="CAUSAL_LM")
        model = peft.get_peft_model(self.torch_base(), settings)
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(0.05 * torch.randn_like(weight))
        return model

    @functools.cache  # noqa: B019  # for as long as the case
    def load_theirs(self, folder):
        return peft.PeftModel.from_pretrained(self.torch_base(), folder, is_trainable=True).eval()


SEVEN = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    @functools.cache
    def base(name):
        folder = tmp_path_factory.mktemp("peft") / name
        models.save(models.random_llama(**SIZES, **BASES[name]), folder)
        return folder, FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)[0]

    return base


@pytest.fixture(scope="module", params=CASES)
def case(request, bases):
    return Case(request.param, bases)


@pytest.fixture(scope="module")
def adapter(case, tmp_path_factory):
    """Ours, as a folder."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    case.ours.save_pretrained(folder, models.tokenizer())
    return folder


def logits(model):
    return np.asarray(evaluate(model.causal_lm, model.params, model.lora)[0])


# Compiled in half the time, and run for three products.
@functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def evaluate(causal_lm, params, lora):
    """(logits, the gradient of the sum of -log p(next)): one program for all that a case asks of a model."""

    def loss(lora):
        hidden, _ = causal_lm.hidden(params, lora, IDS)
        flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        x, w = causal_lm.head(params, flat, lora)
        nll = linear_cross_entropy(x, w, IDS[:, 1:].reshape(-1))
        return nll.sum(), causal_lm.logits(params, hidden, lora)

    if lora is None:
        return loss(None)[1], None
    gradient, out = jax.grad(loss, has_aux=True)(lora)
    return out, gradient


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(IDS).long()).logits.numpy()


def trained_tensors(folder):
    """Without what PEFT adds of the base: the weight beside each low-rank embedding or head."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: tensors[name] for name in sorted(tensors) if not name.endswith("base_layer.weight")}


def load_ours(folder):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)[0]


def test_ours_in_peft(case, adapter):
    """The same logits, and the same gradient of every tensor that is trained."""
    theirs = case.load_theirs(adapter)
    assert relative_rms(logits(case.ours), logits(case.base)) > 1e-2, "it must matter to show anything"
    assert_close(logits(case.ours), torch_logits(theirs), 1e-5)

    ours = case.tensors(evaluate(case.ours.causal_lm, case.ours.params, case.ours.lora)[1])
    expected = torch.nn.functional.cross_entropy(
        theirs(torch.from_numpy(IDS[:, :-1]).long()).logits.flatten(0, 1),
        torch.from_numpy(IDS[:, 1:]).long().flatten(),
        reduction="sum",
    )
    expected.backward()
    gradients = {
        tensor_name(name): weight.grad
        for name, weight in theirs.named_parameters(remove_duplicate=False)
        if weight.requires_grad
    }
    assert ours.keys() == gradients.keys()
    for name, one in ours.items():
        assert_close(one, gradients[name].numpy(), 1e-4, name)


def tensor_name(parameter):
    """A parameter of PEFT's model as its file calls it."""
    name = parameter.replace(".modules_to_save.default", "").replace(".default", "")
    return name.removesuffix(".weight") if "magnitude" in name else name


def test_padding_has_no_gradient_and_is_not_counted(case, capsys):
    """What a layer does not have stays zero, to the bit; the count is PEFT's."""
    model = case.ours
    gradient = evaluate(model.causal_lm, model.params, model.lora)[1]
    assert_trees_equal(jax.tree.map(np.asarray, gradient), case.tree(case.tensors(gradient)))
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    case.theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_ours_again(case, adapter):
    again = load_ours(adapter)
    assert again.causal_lm.lora_config.continues(case.ours.causal_lm.lora_config)
    assert_trees_equal(again.lora, case.ours.lora)
    assert_trees_equal(again.params, case.ours.params)
    assert FastLanguageModel.get_peft_model(again, **case.settings) is again


def test_theirs_in_ours(case, tmp_path):
    case.theirs.save_pretrained(tmp_path / "adapter")
    ours = load_ours(tmp_path / "adapter")
    assert_close(logits(ours), torch_logits(case.theirs), 1e-5)

    ours.save_pretrained(tmp_path / "again")
    assert_trees_equal(*(trained_tensors(tmp_path / which) for which in ("adapter", "again")))


def test_merged(case, adapter, tmp_path):
    case.ours.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(torch_logits(merged), torch_logits(case.load_theirs(adapter)), 2e-5)


def test_a_fresh_adapter_changes_nothing(case):
    distance = relative_rms(logits(case.fresh), logits(case.base))
    if case.settings.get("init_lora_weights") is False:
        assert distance > 1e-2
    elif case.name.startswith("pissa"):
        assert distance < 1e-5, "the base and its principal part are what they were"
        assert relative_rms(logits(dataclasses.replace(case.fresh, lora=None)), logits(case.base)) > 1e-2
    else:
        np.testing.assert_array_equal(logits(case.fresh), logits(case.base))


def test_the_folder_is_what_peft_writes(case, adapter, tmp_path):
    """Names and shapes of the tensors; and settings that PEFT reads as its own."""
    case.theirs.save_pretrained(tmp_path)
    ours, theirs = map(trained_tensors, (adapter, tmp_path))
    assert {name: a.shape for name, a in ours.items()} == {name: a.shape for name, a in theirs.items()}
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(case.folder)
    assert list(settings) == sorted(settings)
    peft.LoraConfig.from_pretrained(adapter)


class Dropped(torch.nn.Module):
    """Drops what jaxtune's key says, in place of PEFT's dropout."""

    def __init__(self, key, keep):
        super().__init__()
        self.key, self.keep = key, keep

    def forward(self, x):
        kept = np.array(jax.random.bernoulli(self.key, self.keep, x.shape))
        return torch.where(torch.from_numpy(kept), x / self.keep, 0)


@pytest.mark.parametrize("name", ["dropout", "everything", "a low-rank head, dropped"])
def test_dropout_reaches_what_pefts_does(bases, tmp_path, name):
    """The input of A (with DoRA, the product that is scaled), but not an embedding's: given the same masks, training's
    outputs are equal."""
    case, key = Case(name, bases), jax.random.key(5)
    case.ours.save_pretrained(tmp_path / "adapter")
    theirs = case.load_theirs(tmp_path / "adapter").train()
    lm, keep = case.ours.causal_lm, 1 - case.settings["lora_dropout"]
    read = with_settings(case.ours.lora, lm.lora_config, lm.module_names, key)
    for path, leaves in modules(read):
        for i, module in enumerate(lm.module_names(path) if "dropout" in leaves else []):
            if lm.lora_config.targets(module) and path != ("embed_tokens",):
                linear = theirs.get_submodule(f"base_model.model.{module}")
                linear.lora_dropout["default"] = Dropped(leaves["dropout"][i], keep)

    hidden, _ = jax.jit(lm.hidden)(case.ours.params, case.ours.lora, IDS, dropout_key=key)
    dropped = product(*lm.head(case.ours.params, hidden, case.ours.lora, key))
    assert relative_rms(dropped, logits(case.ours)) > 1e-2
    assert_close(dropped, theirs(torch.from_numpy(IDS).long()).logits.detach().numpy(), 1e-5)


@pytest.fixture(scope="module")
def mixed(bases, tmp_path_factory):
    """What PEFT wrote for a list of names, which here would mean whole modules."""
    folder, _ = bases("tied")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"], lora_alpha=6)
    return written_by_peft(folder, settings, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def still_tied(bases, tmp_path_factory):
    """A head and an embedding with one low-rank adapter, of which PEFT makes two that share their memory."""
    folder, _ = bases("tied")
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    return written_by_peft(folder, settings, tmp_path_factory.mktemp("still tied"))


def written_by_peft(base, settings, folder):
    """(the folder, the logits)"""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return folder, torch_logits(model)


@pytest.mark.parametrize("which", ["mixed", "still_tied"])
def test_pefts_own_lists(which, request, tmp_path):
    """Read, written so that PEFT reads them again, and merged: with the logits that they had. PEFT's own merge adds
    both changes to the one tensor, and has others."""
    folder, expected = request.getfixturevalue(which)
    ours = load_ours(folder)
    assert_close(logits(ours), expected, 1e-5)
    ours.save_pretrained(tmp_path / "again")
    assert_trees_equal(trained_tensors(tmp_path / "again"), trained_tensors(folder))
    base = AutoModelForCausalLM.from_pretrained(ours.name_or_path)
    assert_close(torch_logits(peft.PeftModel.from_pretrained(base, tmp_path / "again")), expected, 1e-6)
    ours.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(torch_logits(merged), expected, 2e-5)
    is_one = merged.lm_head.weight is merged.model.embed_tokens.weight
    assert is_one is merged.config.tie_word_embeddings is (which == "still_tied")


def test_a_base_that_is_not_quite_the_one_it_names(mixed, tmp_path):
    """PEFT writes its embedding beside the low-rank change, and reads it again; so do we, and merge with it."""
    folder = shutil.copytree(mixed[0], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in tensors:
        if name.endswith("base_layer.weight"):
            tensors[name] *= 1.1
    save_file(tensors, folder / "adapter_model.safetensors")
    ours = load_ours(folder)
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(ours.name_or_path), folder)
    assert_close(logits(ours), torch_logits(theirs), 1e-5)
    ours.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(torch_logits(merged), logits(ours), 2e-5)


def test_one_adapter_for_both_has_the_gradient_of_both(still_tied):
    """Of PEFT's two, the sum."""
    folder, _ = still_tied
    ours = load_ours(folder)
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(ours.name_or_path), folder, is_trainable=True
    )
    ids = torch.from_numpy(IDS).long()
    out = theirs(ids[:, :-1]).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(out, ids[:, 1:].flatten(), reduction="sum").backward()
    embedding, head = theirs.base_model.model.model.embed_tokens, theirs.base_model.model.lm_head
    gradient = evaluate(ours.causal_lm, ours.params, ours.lora)[1]
    assert set(gradient) == {"embed_tokens", "layers"}
    a = embedding.lora_embedding_B["default"].grad.T + head.lora_A["default"].weight.grad
    b = embedding.lora_embedding_A["default"].grad.T + head.lora_B["default"].weight.grad
    assert_close(gradient["embed_tokens"]["a"][0], a.numpy(), 1e-4)
    assert_close(gradient["embed_tokens"]["b"][0], b.numpy(), 1e-4)


def test_one_adapter_for_both_has_one_scale(bases):
    settings = {"target_modules": r".*embed_tokens", "alpha_pattern": {"embed_tokens": 4}}
    with pytest.raises(AdapterError, match=r"scale embed_tokens by 0\.25, lm_head by 1"):
        FastLanguageModel.get_peft_model(bases("tied")[1], ensure_weight_tying=True, **settings)


def test_a_head_that_is_not_the_embedding_it_is_said_to_be(still_tied, tmp_path):
    folder = shutil.copytree(still_tied[0], tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"ensure_weight_tying=True, and .*lm_head\.lora_A"):
        load_ours(folder)


def test_every_setting_of_peft_is_classified():
    """Read, or refused unless neutral, or without meaning here: a setting that is new in PEFT fails this test."""
    known = peft_format.READ | set(peft_format.UNDERSTOOD_ONLY_AS) | peft_format.IRRELEVANT
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= known
