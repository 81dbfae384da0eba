"""Float8 checkpoints, as published: dequantised as they arrive, bit for bit, and packed in the precision asked for."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune import FastLanguageModel, quant
from jaxtune.errors import CheckpointError, UnsupportedModelError
from tests.kit import models

F8 = ml_dtypes.float8_e4m3fn
BLOCK = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
STATIC = {
    "quant_algo": "FP8",
    "kv_cache_scheme": "FP8",
    "ignore": ["lm_head"],
    "producer": {"name": "modelopt"},
}
SIZES = {"hidden_size": 192, "intermediate_size": 320}  # blocks at the ends are short


def shrink(w, scale_shape):
    """float8 codes, scales, and the weight that they stand for."""
    if scale_shape == "block":
        rows, columns = (-(-size // 128) for size in w.shape)
        scales = np.random.default_rng(0).uniform(1e-3, 2e-3, (rows, columns)).astype(np.float32)
        spread = np.repeat(np.repeat(scales, 128, 0), 128, 1)[: w.shape[0], : w.shape[1]]
    else:
        scales = np.full({"scalar": (), "row": (w.shape[0], 1)}[scale_shape], 1.5e-3, np.float32)
        spread = np.broadcast_to(scales, w.shape)
    codes = (w / spread).astype(F8)
    return codes, scales, codes.astype(np.float32) * spread


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    source = models.save(models.random_llama(**SIZES), tmp_path_factory.mktemp("f8") / "model")

    def write(folder, scale_shape, config, suffix):
        folder.mkdir()
        for file in source.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        tensors, expected = load_file(source / "model.safetensors"), {}
        for name in [name for name in tensors if "proj" in name]:
            codes, scales, expected[name] = shrink(tensors[name], scale_shape)
            module = name.removesuffix("weight")
            tensors |= {name: codes, module + suffix: scales}
            if config is STATIC:
                tensors[module + "input_scale"] = np.array(0.1, np.float32)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
        (folder / "config.json").write_text(json.dumps(settings))
        return expected

    return write


@pytest.mark.parametrize(
    ("scale_shape", "config", "suffix"),
    [
        ("block", BLOCK, "weight_scale_inv"),
        ("scalar", STATIC, "weight_scale"),
        ("row", {"quant_method": "fp8"}, "weight_scale"),
    ],
    ids=["DeepSeek's and Qwen's blocks", "ModelOpt's one scale", "a scale a row"],
)
def test_values_are_code_times_scale(make, tmp_path, caplog, scale_shape, config, suffix):
    expected = make(tmp_path / "f8", scale_shape, config, suffix)
    with caplog.at_level("WARNING", "jaxtune"):
        model, _ = FastLanguageModel.from_pretrained(tmp_path / "f8", dtype="float32", load_in_16bit=True)
    assert not caplog.records, "scales have their place"
    up = model.params["layers"][0][0]["mlp"]["up_proj"]["weight"]
    for i in range(2):
        np.testing.assert_array_equal(up[i], expected[f"model.layers.{i}.mlp.up_proj.weight"])


def test_packed_as_asked(make, tmp_path):
    expected = make(tmp_path / "f8", "block", BLOCK, "weight_scale_inv")
    model, _ = FastLanguageModel.from_pretrained(tmp_path / "f8", dtype="bfloat16")
    up = model.params["layers"][0][0]["mlp"]["up_proj"]["weight"]
    whole = jnp.asarray(expected["model.layers.1.mlp.up_proj.weight"], jnp.bfloat16)
    assert isinstance(up, quant.NF4Array)
    np.testing.assert_array_equal(up.codes[1], quant.quantize(whole, quant.FourBit()).codes)


def test_float8_without_scales_is_refused(make, tmp_path):
    make(tmp_path / "f8", "scalar", STATIC, "scale_by_another_name")
    with pytest.raises(CheckpointError, match="without its scales"):
        FastLanguageModel.from_pretrained(tmp_path / "f8")


def test_other_blocks_are_refused(make, tmp_path):
    make(tmp_path / "f8", "block", {**BLOCK, "weight_block_size": [64, 64]}, "weight_scale_inv")
    with pytest.raises(UnsupportedModelError, match=r"\[64, 64\]"):
        FastLanguageModel.from_pretrained(tmp_path / "f8")
