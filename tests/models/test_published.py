"""Configs as people publish them, old key styles included: each builds its model, and every weight of a published index
has a place. The files are read where the project keeps them, and are not ours to commit."""

import json
from pathlib import Path

import jax
import pytest

from jaxtune.loading.config import read_config
from jaxtune.models import names
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import LayerKind
from jaxtune.models.families import FAMILIES

PUBLISHED = Path(__file__).parents[3] / "shared" / "fixtures" / "published"


FOLDERS = [
    path.parent
    for path in sorted(PUBLISHED.glob("*/config.json"))
    if json.loads(path.read_text()).get("model_type") in FAMILIES
]
if not FOLDERS:
    print(f"no published configs in {PUBLISHED}: the tests over them have no cases")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_builds_and_accounts_for_every_weight(folder):
    hf = read_config(folder, supported=FAMILIES)
    model = CausalLM(FAMILIES[hf["model_type"]](hf))
    leaves = jax.tree_util.tree_leaves_with_path(model.skeleton)
    expected = {name for path, _ in leaves for name in names.hf_names(model.config, names.keys(path))}
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "quantization_config" not in hf:
        found = set(json.loads(index.read_text())["weight_map"])
        assert {name for name in found if not name.endswith("rotary_emb.inv_freq")} == expected


def published(name):
    return [folder for folder in FOLDERS if folder.name == name]


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


@pytest.mark.parametrize(
    ("folder", "parameters"), [("llama-3.1-8b", 8_030_261_248), ("llama-3.2-3b", 3_212_749_824)]
)
def test_has_the_published_number_of_parameters(folder, parameters):
    """8B and 3B as their model cards count them; sizes written down here, so that no file is needed."""
    sizes = {"llama-3.1-8b": (4096, 14336, 32, 32, False), "llama-3.2-3b": (3072, 8192, 24, 28, True)}
    hidden, ffn, heads, layers, tied = sizes[folder]
    hf = {
        "hidden_act": "silu", "vocab_size": 128256, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False,
        "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }  # fmt: skip
    skeleton = CausalLM(FAMILIES["llama"](hf)).skeleton
    assert sum(leaf.size for leaf in jax.tree.leaves(skeleton)) == parameters
