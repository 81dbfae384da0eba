"""Configs as people publish them, old key styles included: each builds its model and every weight of a published index
has a place, or it is refused with the reason. Of each family one is written down, for where the files are not."""

import json
from typing import Any

import jax
import pytest

from jaxtune.errors import UnsupportedModelError
from jaxtune.loading.config import read_config
from jaxtune.loading.precision import require_known
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import LayerKind
from jaxtune.models.families import FAMILIES
from tests.kit.published import FACTS, folders


def settings_of(folder) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def is_known(folder) -> bool:
    """Whether family and quantisation are ours. MLX names no method."""
    settings = settings_of(folder)
    quantization = settings.get("quantization_config")
    return settings["model_type"] in FAMILIES and (
        not quantization or "quant_method" in quantization or "quant_algo" in quantization
    )


ALL = folders("config.json")
KNOWN = [folder for folder in ALL if is_known(folder)]
BESIDE_WEIGHTS = {"bitsandbytes": (".SCB", ".weight_format")}
"""What lies beside a weight that is quantised."""


def build(folder) -> tuple[CausalLM, dict[str, Any]]:
    hf = read_config(folder, supported=FAMILIES)
    require_known(hf, folder)
    return CausalLM(FAMILIES[hf["model_type"]](hf)), hf


def weights_of(model: CausalLM) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(model.skeleton)
    return {name for path, _ in leaves for name in names.hf_names(model.config, names.keys(path))}


@pytest.mark.parametrize("folder", KNOWN, ids=lambda folder: folder.name)
def test_builds_and_accounts_for_every_weight(folder):
    model, hf = build(folder)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        beside = BESIDE_WEIGHTS.get(hf.get("quantization_config", {}).get("quant_method"), ())
        found = set(json.loads(index.read_text())["weight_map"])
        assert {name for name in found if not name.endswith(("rotary_emb.inv_freq", *beside))} == weights_of(
            model
        )


@pytest.mark.parametrize("folder", [f for f in ALL if f not in KNOWN], ids=lambda folder: folder.name)
def test_others_are_refused_with_the_reason(folder):
    with pytest.raises(UnsupportedModelError) as caught:
        build(folder)
    quantised = settings_of(folder)["model_type"] in FAMILIES
    assert ("quantised" if quantised else repr(settings_of(folder)["model_type"])) in caught.value.found
    assert "Did you mean" not in caught.value.fix, "a model of its own is no mistyped one of ours"


def test_every_family_is_written_down():
    assert {facts.config["model_type"] for facts in FACTS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", FACTS)
def test_what_is_written_down(name, tmp_path):
    """The names of its weights, and the number of its parameters as the model card has it."""
    config, layer, parameters = FACTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, hf = build(tmp_path)
    in_layer = [part if part.endswith("bias") else f"{part}.weight" for part in layer.split()]
    expected = {f"model.layers.{i}.{part}" for i in range(config["num_hidden_layers"]) for part in in_layer}
    expected |= {"model.embed_tokens.weight", "model.norm.weight"}
    assert weights_of(model) == expected | (set() if hf["tie_word_embeddings"] else {"lm_head.weight"})
    assert sum(leaf.size for leaf in jax.tree.leaves(model.skeleton)) == parameters


def published(name):
    return [folder for folder in KNOWN if folder.name == name]


@pytest.mark.parametrize("folder", published("gemma-3-4b-text"), ids=lambda folder: folder.name)
def test_two_ropes_of_an_old_gemma_3_config(folder):
    """`rope_theta`, `rope_local_base_freq` and `rope_scaling` side by side."""
    c = FAMILIES["gemma3_text"](read_config(folder))
    assert [(rope.kind, rope.theta, rope.factor) for rope in c.ropes] == [
        ("linear", 1e6, 8.0),
        ("default", 1e4, 1.0),
    ]
    assert c.layers[:6] == (LayerKind(1024, 1),) * 5 + (LayerKind(None, 0),)
    assert c.segments == ((range(30), 6), (range(30, 34), 4))
