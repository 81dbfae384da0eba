"""bitsandbytes checkpoints, both ways: what transformers wrote is loaded bit for bit, never dequantised; what we save,
transformers loads, and computes the same logits as from its own."""

import json
import shutil

import bitsandbytes as bnb
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxtune import FastLanguageModel
from jaxtune.errors import CheckpointError, ModelNotFoundError, OptionError
from jaxtune.export.bnb_folder import save_bnb
from jaxtune.quant import FourBit, Int8Array, PackedArray
from tests.kit import families, models
from tests.kit.compare import assert_close, assert_trees_equal

TOKENS = np.random.default_rng(0).integers(0, models.VOCAB, (2, 24))
KINDS = {
    "nf4 double": FourBit("nf4", True),
    "nf4": FourBit("nf4", False),
    "fp4 double": FourBit("fp4", True),
    "fp4": FourBit("fp4", False),
}
# Widths whose rows hold whole tiles, an odd number of blocks, and blocks that cross rows.
SIZES = {"nf4 double": {"intermediate_size": 200, "tie_word_embeddings": True}, "fp4": {"hidden_size": 192}}


def load_theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()


def logits(theirs):
    """In training mode (there is no dropout): in evaluation, bitsandbytes takes a bfloat16 path on some CPUs."""
    theirs.train()
    with torch.no_grad():
        return theirs(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folders = {}

    def get(kind):
        if kind not in folders:
            model = models.random_llama(**SIZES.get(kind, {})).to(torch.float32)
            folders[kind] = models.save(model, tmp_path_factory.mktemp("plain") / "model")
        return folders[kind]

    return get


def write_theirs(source, target, format, **options):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format.values,
        bnb_4bit_use_double_quant=format.double,
        bnb_4bit_compute_dtype=torch.float32,
        **options,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()
    theirs.save_pretrained(target)
    models.tokenizer().save_pretrained(target)
    return theirs


@pytest.fixture(scope="module", params=KINDS)
def both(request, plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bnb") / "model"
    theirs = write_theirs(plain(request.param), folder, KINDS[request.param])
    ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
    return KINDS[request.param], theirs, ours, folder


def modules(theirs):
    return {name: m for name, m in theirs.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def our_weights(ours):
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        ours.params, is_leaf=lambda x: isinstance(x, PackedArray)
    ):
        if isinstance(leaf, PackedArray):
            keys = tuple(k.key for k in path)
            for i, name in enumerate(ours.module_names(keys)):
                yield name.removesuffix(".weight"), jax.tree.map(lambda stack, i=i: stack[i], leaf)


def test_every_quantised_weight_is_packed_and_has_their_values(both):
    format, theirs, ours, _ = both
    expected, found = modules(theirs), dict(our_weights(ours))
    assert found.keys() == expected.keys() and len(found) == 14
    dequantize = jax.jit(lambda w: w.dequantize())
    for name, module in expected.items():
        assert found[name].format == format
        values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        np.testing.assert_array_equal(dequantize(found[name]), values.numpy(), err_msg=name)


def test_logits_are_theirs(both):
    _, theirs, ours, _ = both
    assert_close(ours.apply(ours.params, None, jnp.asarray(TOKENS)), logits(theirs), 1e-5)


def test_saved_again_it_is_the_same_checkpoint(both, tmp_path):
    """Every tensor byte for byte, so that transformers computes the very same logits."""
    _, theirs, ours, folder = both
    save_bnb(tmp_path / "ours", folder, ours.causal_lm, ours.params, max_shard_size="100KB")
    again, original = {}, load_file(folder / "model.safetensors")
    for shard in sorted((tmp_path / "ours").glob("model-*.safetensors")):
        again |= load_file(shard)
    assert again.keys() == original.keys()
    for name, tensor in original.items():
        if "quant_state" in name:
            assert json.loads(again[name].tobytes()) == json.loads(tensor.tobytes())
        else:
            np.testing.assert_array_equal(again[name], tensor, err_msg=name)
            assert (again[name].dtype, again[name].shape) == (tensor.dtype, tensor.shape)
    np.testing.assert_array_equal(logits(load_theirs(tmp_path / "ours")), logits(theirs))


def test_what_we_quantise_they_load(plain, tmp_path):
    """From 16 bits: our codes and scales, in their format, give their logits."""
    source = plain("nf4")
    ours, tokenizer = FastLanguageModel.from_pretrained(source, dtype="float32", load_in_4bit=True)
    ours.save_pretrained(tmp_path / "ours", tokenizer)
    mine = ours.apply(ours.params, None, jnp.asarray(TOKENS))
    assert_close(mine, logits(load_theirs(tmp_path / "ours")), 1e-5)


def test_a_merge_that_is_quantised_then(plain, tmp_path):
    """They load it; and it is the 16-bit merge, loaded in 4 bits, to the bit."""
    model, tokenizer = FastLanguageModel.from_pretrained(plain("nf4"), dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    draw = np.random.default_rng(1)
    model.lora = jax.tree.map(lambda x: x + 0.05 * draw.standard_normal(x.shape, np.float32), model.lora)
    model.save_pretrained_merged(tmp_path / "four", tokenizer, save_method="merged_4bit")
    model.save_pretrained_merged(tmp_path / "sixteen", tokenizer)
    four, sixteen = (
        FastLanguageModel.from_pretrained(tmp_path / name, dtype="float32", load_in_4bit=True)[0]
        for name in ("four", "sixteen")
    )
    assert_trees_equal(four.params, sixteen.params)
    mine = four.apply(four.params, None, jnp.asarray(TOKENS))
    assert_close(mine, logits(load_theirs(tmp_path / "four")), 1e-5)


# Widths that bitsandbytes' own CPU kernel unpacks rightly: not those that are 32 more than a multiple of 64.
WIDE = {"hidden_size": 128, "intermediate_size": 192}


def test_fused_projections_too(tmp_path):
    source = models.save(families.random_model("phi3", **WIDE), tmp_path / "model")
    theirs = write_theirs(source, tmp_path / "bnb", FourBit(), llm_int8_skip_modules=["lm_head"])
    ours, _ = FastLanguageModel.from_pretrained(tmp_path / "bnb", dtype="float32", max_seq_length=64)
    expected, found = modules(theirs), dict(our_weights(ours))
    assert found.keys() == expected.keys()
    for name, module in expected.items():
        values = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        np.testing.assert_array_equal(found[name].dequantize(), values.numpy(), err_msg=name)
    assert_close(ours.apply(ours.params, None, jnp.asarray(TOKENS)), logits(theirs), 1e-5)


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_by_another_name(plain, tmp_path, storage):
    """bnb_4bit_quant_storage changes what the file calls the bytes, not the bytes."""
    write_theirs(plain("nf4"), tmp_path / "uint8", FourBit())
    write_theirs(plain("nf4"), tmp_path / "other", FourBit(), bnb_4bit_quant_storage=getattr(torch, storage))
    usual, other = (FastLanguageModel.from_pretrained(tmp_path / each)[0] for each in ("uint8", "other"))
    for (name, a), (_, b) in zip(our_weights(usual), our_weights(other), strict=True):
        np.testing.assert_array_equal(a.codes, b.codes, err_msg=name)


def test_int8_checkpoints_too(plain, tmp_path):
    source = plain("nf4")
    ours, _ = FastLanguageModel.from_pretrained(source, dtype="float32", load_in_8bit=True)
    ours.save_pretrained(tmp_path / "int8")
    theirs = load_theirs(tmp_path / "int8")
    again, _ = FastLanguageModel.from_pretrained(tmp_path / "int8", dtype="float32")
    for (name, a), (_, b) in zip(our_weights(ours), our_weights(again), strict=True):
        assert isinstance(b, Int8Array)
        np.testing.assert_array_equal(a.codes, b.codes)
        module = theirs.get_submodule(name)
        np.testing.assert_array_equal(b.codes, module.weight.data.numpy())
    # bitsandbytes rounds activations to int8 as well, which we do not.
    assert_close(again.apply(again.params, None, jnp.asarray(TOKENS)), logits(theirs), 0.05)


@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_a_merge_is_not_of_a_quantised_base(plain, tmp_path, storage):
    """Nothing is written; with the original named, the very model is merged."""
    write_theirs(plain("nf4"), tmp_path / "bnb", FourBit(), bnb_4bit_quant_storage=getattr(torch, storage))
    bare, _ = FastLanguageModel.from_pretrained(tmp_path / "bnb", dtype="float32")
    model = FastLanguageModel.get_peft_model(bare, r=4, init_lora_weights=False)
    for each in (bare, model):
        for save in (each.save_pretrained_merged, each.save_pretrained_gguf):
            with pytest.raises(ModelNotFoundError, match="holds quantised ones"):
                save(tmp_path / "merged")
    assert not list(tmp_path.glob("merged*"))
    model.save_pretrained_merged(tmp_path / "merged", original_model=plain("nf4"))
    whole, _ = FastLanguageModel.from_pretrained(plain("nf4"), dtype="float32", load_in_16bit=True)
    ours = model.causal_lm.apply(whole.params, model.lora, jnp.asarray(TOKENS))
    assert_close(ours, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), 1e-4)


@pytest.fixture(scope="module")
def checkpoint(plain, tmp_path_factory):
    """One linear of one layer is in 16 bits, as in checkpoints that spare some modules."""
    folder = tmp_path_factory.mktemp("edited") / "model"
    theirs = write_theirs(
        plain("nf4"), folder, FourBit(), llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.up_proj"]
    )
    return theirs, folder


class TestChoice:
    def test_it_is_made_by_what_lies_beside_each_weight(self, checkpoint, caplog):
        theirs, folder = checkpoint
        with caplog.at_level("WARNING", "jaxtune"):
            ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32")
        mlp = ours.params["layers"][0][0]["mlp"]
        assert isinstance(mlp["gate_proj"]["weight"], PackedArray)
        assert mlp["up_proj"]["weight"].dtype == jnp.float32, "not alike in all layers"
        assert "mlp.up_proj.weight is quantised in some layers only (1 of 2)" in caplog.text
        assert_close(ours.apply(ours.params, None, jnp.asarray(TOKENS)), logits(theirs), 1e-5)

    def test_16_bits_hold_the_same_values(self, checkpoint):
        theirs, folder = checkpoint
        ours, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)
        assert not list(our_weights(ours))
        assert_close(ours.apply(ours.params, None, jnp.asarray(TOKENS)), logits(theirs), 1e-5)

    def test_another_precision_is_refused(self, checkpoint):
        with pytest.raises(OptionError, match="NF4 with double quantisation, and int8 was asked for"):
            FastLanguageModel.from_pretrained(checkpoint[1], load_in_8bit=True)

    def test_maps_that_another_torch_rounded_are_said(self, checkpoint, tmp_path, caplog):
        folder = shutil.copytree(checkpoint[1], tmp_path / "rounded")
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.self_attn.k_proj.weight.nested_quant_map"
        tensors[name] = np.nextafter(tensors[name], np.float32(2))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with caplog.at_level("WARNING", "jaxtune"):
            FastLanguageModel.from_pretrained(folder)
        assert "value maps of 1 weights differ" in caplog.text

    @pytest.mark.parametrize(
        ("part", "edit", "message"),
        [
            (".quant_map", lambda a: a[::-1].copy(), "other values than bitsandbytes' own"),
            (".nested_quant_map", None, "not all that belongs to them"),
            (".absmax", lambda a: a[:-1], "63 bytes"),
            (".quant_state.bitsandbytes__nf4", lambda a: a[:-3], "no JSON"),
            (".nested_absmax", lambda a: a * np.float32("nan"), "NaN or infinite"),
        ],
    )
    def test_a_damaged_one_is_refused(self, checkpoint, tmp_path, part, edit, message):
        folder = shutil.copytree(checkpoint[1], tmp_path / "broken")
        tensors = load_file(folder / "model.safetensors")
        name = f"model.layers.0.self_attn.k_proj.weight{part}"
        tensor = tensors.pop(name)
        if edit is not None:
            tensors[name] = edit(tensor)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            FastLanguageModel.from_pretrained(folder)
