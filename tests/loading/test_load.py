"""Loading into packed arrays: what ends up where, in which precision, and in how much memory."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxtune import FastLanguageModel
from jaxtune.loading import load
from jaxtune.loading.plan import abstract_params
from jaxtune.loading.stored import Plain
from jaxtune.quant import Float8, FourBit, Int8, Unpacked
from jaxtune.quant.nf4 import NF4Array, abstract, quantize
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal
from tests.kit.hub import FakeHub


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    theirs = models.random_llama(tie_word_embeddings=True)
    return theirs, models.save(theirs, tmp_path_factory.mktemp("load") / "model", max_shard_size="200KB")


PRECISIONS = [
    ({}, FourBit()),
    ({"load_in_4bit": False}, Unpacked()),
    ({"load_in_16bit": True}, Unpacked()),
    ({"load_in_8bit": True}, Int8()),
    ({"load_in_fp8": True}, Float8()),
    ({"load_in_fp8": "block"}, Float8(128)),
    ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, FourBit("nf4", False)),
]


@pytest.mark.parametrize(
    ("options", "precision", "dtype"),
    [(*each, "bfloat16") for each in PRECISIONS] + [({}, FourBit(), "float32"), ({}, FourBit(), "float16")],
)
def test_shapes_are_known_beforehand(base, options, precision, dtype):
    model, _ = FastLanguageModel.from_pretrained(base[1], dtype=dtype, **options)
    promised = abstract_params(model.causal_lm, dtype=jnp.dtype(dtype), precision=precision)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), promised
    )


@pytest.mark.parametrize(("options", "precision"), PRECISIONS[2:])
def test_every_precision_computes(base, options, precision):
    """Logits near the original's, as near as its bits allow. Gradients: tests/quant/test_packed.py."""
    theirs, folder = base
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", **options)
    tokens = np.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    tolerance = {4: 0.35, 8: 0.1, 16: 1e-5}[precision.bits]
    assert_close(model.apply(model.params, None, jnp.asarray(tokens)), expected, tolerance)


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
    specs, structure = jax.tree.flatten(abstract((64, 256, 256), "bfloat16"))
    target_specs = tuple((spec.shape, spec.dtype.name) for spec in specs)
    parts = (("weight", ((256, 256), "bfloat16")),)
    _, compiled = load._compile(jax.devices()[0], Plain(), True, parts, structure, target_specs)
    memory = compiled.memory_analysis()
    stack = sum(spec.size * spec.dtype.itemsize for spec in specs)
    assert memory.alias_size_in_bytes >= stack
    assert memory.temp_size_in_bytes < stack


def test_large_tables_come_in_pieces_of_one_shape(base, monkeypatch):
    """384 rows in pieces of 100 and less: the last overlaps, and every row arrives."""
    theirs, folder = base
    monkeypatch.setattr(load, "CHUNK", 100 * 128 * 4)
    params = FastLanguageModel.from_pretrained(folder, dtype="float32")[0].params
    np.testing.assert_array_equal(
        params["embed_tokens"]["weight"], theirs.model.embed_tokens.weight.detach().numpy()
    )


def test_a_model_is_loaded_by_a_program_a_shape(base):
    """However many layers there are; a second load compiles nothing."""
    load._compile.cache_clear()
    FastLanguageModel.from_pretrained(base[1], dtype="bfloat16")
    programs = load._compile.cache_info().misses
    assert programs == 7, "embedding, last norm, norms, q and o, k and v, gate and up, down"
    FastLanguageModel.from_pretrained(base[1], dtype="bfloat16")
    assert load._compile.cache_info().misses == programs


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


def test_an_adapter_by_hub_id_brings_its_base(base, tmp_path):
    """Each at its own revision, the gated base with the token that was given; it computes what the saved one did."""
    model, tokenizer = FastLanguageModel.from_pretrained(base[1], dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter", tokenizer)
    path = tmp_path / "adapter/adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "base_model_name_or_path": "tests/llama", "revision": "v1"}))
    code = """
from jaxtune import FastLanguageModel
from jaxtune.errors import JaxtuneError
load = lambda **token: FastLanguageModel.from_pretrained("tests/adapter", revision="b", dtype="float32", **token)[0]
try:
    load()
except JaxtuneError as error:
    print(type(error).__name__, "names 'tests/llama' as its base model" in str(error), "gated" in str(error))
model = load(token="secret")
print(model.name_or_path, model.revision)
print(model.generate([[5, 6, 7]], max_new_tokens=5).tolist())
"""
    with FakeHub() as hub:
        hub.add("tests/llama", base[1], revision="v1")
        hub.gate("tests/llama", token="secret")
        hub.add("tests/adapter", tmp_path / "adapter", revision="b")
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.environment(tmp_path / "home"),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "ModelNotFoundError True True",
        "tests/llama v1",
        str(model.generate([[5, 6, 7]], max_new_tokens=5).tolist()),
    ]
