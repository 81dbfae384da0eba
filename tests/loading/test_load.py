"""Loading into packed arrays: what ends up where, in which precision, and in how much memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import FastLanguageModel
from jaxtune.loading.load import _buffer, _put, abstract_params
from jaxtune.quant.nf4 import NF4Array, quantize
from tests.kit import models
from tests.kit.compare import assert_trees_equal
from tests.kit.hub import FakeHub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    theirs = models.random_llama(tie_word_embeddings=True)
    return theirs, models.save(theirs, tmp_path_factory.mktemp("load") / "model", max_shard_size="200KB")


@pytest.mark.parametrize("in_4bit", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shapes_are_known_beforehand(base, dtype, in_4bit):
    model, _ = FastLanguageModel.from_pretrained(base[1], dtype=dtype, load_in_4bit=in_4bit)
    promised = abstract_params(model.causal_lm, dtype=jnp.dtype(dtype), in_4bit=in_4bit)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), promised
    )


def test_linears_are_packed_and_nothing_else(base):
    theirs, folder = base
    params = FastLanguageModel.from_pretrained(folder, dtype="bfloat16")[0].params
    block = params["layers"][0][0]
    packed = {
        f"{group}.{name}": isinstance(module["weight"], NF4Array)
        for group in ("self_attn", "mlp")
        for name, module in block[group].items()
    }
    assert all(packed.values()) and len(packed) == 7
    for plain in (params["embed_tokens"], params["norm"], block["input_layernorm"]):
        assert plain["weight"].dtype == jnp.bfloat16
    assert "lm_head" not in params, "tied"
    weight = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy()
    one = jax.tree.map(lambda a: a[1], block["mlp"]["up_proj"]["weight"])
    assert_trees_equal(one, jax.jit(quantize)(jnp.asarray(weight, jnp.bfloat16)))


def test_stacks_are_filled_in_place():
    """The buffer is donated and reused: writing a layer allocates one layer, never a second stack."""
    buffer = _buffer((64, 256, 256), jnp.dtype("bfloat16"), packed=True)
    compiled = _put.lower(buffer, jnp.zeros((256, 256), jnp.bfloat16), 0).compile()
    memory = compiled.memory_analysis()
    stack = sum(leaf.nbytes for leaf in jax.tree.leaves(buffer))
    assert memory.alias_size_in_bytes >= stack
    assert memory.temp_size_in_bytes < stack


def test_weights_without_a_place_are_reported(base, tmp_path, caplog):
    import shutil

    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(base[1], tmp_path / "model")
    shard = next(folder.glob("model-00001*.safetensors"))
    tensors = {**load_file(shard), "model.vision.weight": np.zeros(3, np.float32)}
    save_file(tensors, shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace(
            '"weight_map": {', f'"weight_map": {{"model.vision.weight": "{shard.name}",'
        )
    )
    with caplog.at_level("WARNING", "jaxtune"):
        FastLanguageModel.from_pretrained(folder, dtype="float32")
    assert "model.vision.weight" in caplog.text


def test_by_hub_id(base, tmp_path):
    """The same model from a hub (on loopback), by id and revision; then offline, from the cache."""
    code = """
import sys, numpy as np
from jaxtune import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained("tests/llama", revision="v1", dtype="float32")
print(model.generate([[5, 6, 7]], max_new_tokens=5).tolist())
"""
    ours, _ = FastLanguageModel.from_pretrained(base[1], dtype="float32")
    expected = str(ours.generate([[5, 6, 7]], max_new_tokens=5).tolist())
    with FakeHub() as hub:
        hub.add("tests/llama", base[1], revision="v1")
        for environment in (hub.environment(tmp_path), hub.environment(tmp_path, HF_HUB_OFFLINE="1")):
            done = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.strip() == expected
