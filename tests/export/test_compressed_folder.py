"""A compressed-tensors folder holds the codes that the library itself would write, and transformers loads it."""

import json
import logging
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from jaxtune import FastLanguageModel
from jaxtune.errors import UnsupportedModelError
from jaxtune.export import ahead
from jaxtune.export.compressed_folder import (
    SCHEMES,
    codes_of,
    pack,
    quantization_config,
    save_compressed,
    scales_of,
)
from jaxtune.loading.checkpoint import Checkpoint
from tests.export.adapted import IDS, Adapted, torch_logits
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal, relative_rms

# Its settings are the file's, but for the one that is meant.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("compressed"), dtype="bfloat16", tie_word_embeddings=True)


def save(adapted, folder, scheme, **options):
    save_compressed(folder, adapted._trained, scheme=scheme, **options)
    return folder


def library_scheme(scheme):
    """As the library reads our own settings."""
    config = QuantizationConfig.model_validate(quantization_config(SCHEMES[scheme], []))
    return config.config_groups["group_0"], config.format


def awkward_weights(dtype):
    """[40, 384]: of all sizes, with ties between codes, zeros, outliers and numbers near the ends of the dtype."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 384)) * 10.0 ** rng.integers(-4, 2, (40, 1))
    rows[0] = 0
    rows[1] = np.arange(384) % 15 / 2 - 3.5  # halfway between codes, with a scale of 2^-n
    rows[2, :5] = 1000
    rows[3] = 1e-7
    rows[4] = 1.5
    rows[5, 128:] = 0
    return rows.astype(dtype)


def to_torch(array):
    return torch.from_numpy(np.array(array, np.float32))


@each_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_librarys(scheme, dtype):
    """Bit for bit, given the weights in float32 and our scales."""
    weight = awkward_weights(DTYPES[dtype])
    ours = SCHEMES[scheme]
    scales = scales_of(weight, ours)
    codes = codes_of(weight, scales, ours)
    theirs, format = library_scheme(scheme)
    state = {"weight": to_torch(weight), "weight_scale": to_torch(scales)}
    compressed = BaseCompressor.get_value_from_registry(format).compress(state, theirs)
    if ours.is_float:
        np.testing.assert_array_equal(codes.view(np.uint8), compressed["weight"].view(torch.uint8).numpy())
    else:
        np.testing.assert_array_equal(pack(codes, ours.bits), compressed["weight_packed"].numpy())


@each_scheme
@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_the_librarys(scheme, dtype):
    weight = awkward_weights(DTYPES[dtype])
    grouped = to_torch(weight).to(getattr(torch, dtype)).unflatten(-1, (-1, SCHEMES[scheme].group or 384))
    args = library_scheme(scheme)[0].weights
    theirs, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    np.testing.assert_array_equal(
        scales_of(weight, SCHEMES[scheme]).astype(np.float32), theirs.float().numpy()
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [128, 132, 61])
def test_packing_pads_a_row_as_the_library_does(bits, columns):
    codes = (
        np.random.default_rng(0).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, columns)).astype(np.int8)
    )
    scheme = preset_name_to_scheme(f"W{bits}A16", ["Linear"])
    scheme.weights.strategy, scheme.weights.group_size = "channel", None
    state = {"weight": torch.from_numpy(codes).float(), "weight_scale": torch.ones(3, 1)}
    theirs = BaseCompressor.get_value_from_registry("pack-quantized").compress(state, scheme)
    np.testing.assert_array_equal(pack(codes, bits), theirs["weight_packed"].numpy())


def dequantised(folder):
    """transformers' model of it, with the weights as numbers again: nothing is rounded while it runs."""
    given = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=given, dtype="auto")


@each_scheme
def test_transformers_has_the_weights_that_were_written(adapted, tmp_path, scheme):
    """They are code * scale, rounded to the model's dtype; with them, its logits are ours."""
    folder, ours = save(adapted, tmp_path / scheme, scheme), SCHEMES[scheme]
    theirs = dequantised(folder)
    merged = Checkpoint(adapted.save_merged(tmp_path / "merged"))
    state = theirs.state_dict()
    for name in merged.names:
        weight = merged.read(name)
        if name.startswith("model.layers.") and weight.ndim == 2:
            scales = scales_of(weight, ours)
            codes = codes_of(weight, scales, ours).astype(weight.dtype)
            weight = (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(weight.shape)
        np.testing.assert_array_equal(weight.astype(np.float32), state[name].float().numpy(), err_msg=name)
    plain = models.save(theirs.float(), tmp_path / "plain")
    model, _ = FastLanguageModel.from_pretrained(plain, dtype="float32", load_in_16bit=True)
    logits = torch_logits(theirs)
    assert_close(jax.jit(model.causal_lm.apply)(model.params, None, IDS), logits, 1e-4)
    assert relative_rms(logits, adapted.logits) < {"fp8_dynamic": 0.1, "w8a16": 0.03, "w4a16": 0.5}[scheme]


@each_scheme
def test_transformers_runs_it_as_it_is(adapted, tmp_path, scheme):
    """In fp8_dynamic, what goes into a linear is rounded too."""
    folder = save(adapted, tmp_path / scheme, scheme)
    packed = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert hasattr(packed.model.layers[0].mlp.up_proj, "weight_scale"), "packed until it is run"
    distance = relative_rms(torch_logits(packed), torch_logits(dequantised(folder)))
    assert 1e-3 < distance < 0.1 if scheme == "fp8_dynamic" else distance == 0


def test_ours_reads_float8_again(adapted, tmp_path):
    """And says what it cannot read."""
    folder = save(adapted, tmp_path / "fp8", "fp8_dynamic")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)
    theirs = dequantised(folder).state_dict()["model.layers.1.mlp.down_proj.weight"].float().numpy()
    assert_close(model.params["layers"][0][0]["mlp"]["down_proj"]["weight"][1], theirs, 2**-8)
    packed = save(adapted, tmp_path / "w4a16", "w4a16")
    with pytest.raises(UnsupportedModelError, match="already \\(compressed-tensors pack-quantized"):
        FastLanguageModel.from_pretrained(packed)


def test_what_is_not_a_linear_of_the_layers_keeps_its_bytes(adapted, tmp_path):
    merged = Checkpoint(adapted.save_merged(tmp_path / "merged"))
    packed = Checkpoint(save(adapted, tmp_path / "w4a16", "w4a16"))
    kept = [name for name in merged.names if name in packed]
    assert len(kept) == len(merged.names) - 14 and "model.embed_tokens.weight" in kept
    assert all(packed.read(name).tobytes() == merged.read(name).tobytes() for name in kept)
    assert packed.read("model.layers.0.mlp.up_proj.weight_shape").tolist() == [256, 128]


def test_the_config(adapted, tmp_path):
    folder = save(adapted, tmp_path / "fp8", "fp8_dynamic")
    settings = json.loads((folder / "config.json").read_text())
    assert settings["dtype"] == "bfloat16"
    ours = QuantizationConfig.model_validate(settings["quantization_config"])
    assert ours.quantization_status == "compressed"
    assert ours.ignore == ["lm_head"]
    theirs = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    assert ours.config_groups["group_0"].model_dump() == theirs.model_dump()


def test_rows_that_groups_do_not_fill(tmp_path, caplog):
    """Stay in 16 bits, and are said; a model that has no others is refused."""
    adapted = Adapted(tmp_path / "in", dtype="bfloat16", intermediate_size=192)
    with caplog.at_level(logging.INFO):
        folder = save(adapted, tmp_path / "w4a16", "w4a16")
    assert "2 linears of 14 stay in 16 bits: groups of 128 do not fill rows of 192" in caplog.text
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head",
        *(f"model.layers.{i}.mlp.down_proj" for i in range(2)),
    ]
    theirs = dequantised(folder)
    assert relative_rms(torch_logits(theirs), adapted.logits) < 0.5
    small = Adapted(tmp_path / "small", num_hidden_layers=1, hidden_size=64, intermediate_size=96, head_dim=8)
    with pytest.raises(UnsupportedModelError, match=r"rows of 64 or 96, and the model has no others"):
        save(small, tmp_path / "none", "w4a16")
    assert not (tmp_path / "none").exists()


@each_scheme
def test_a_head_of_its_own_and_shards(tmp_path, scheme):
    adapted = Adapted(tmp_path / "in", dtype="float16", attention_bias=True, mlp_bias=True)
    one, many = (
        save(adapted, tmp_path / "one", scheme),
        save(adapted, tmp_path / "many", scheme, max_shard_size="100KB"),
    )
    assert len(list(many.glob("*.safetensors"))) > 3
    assert_trees_equal(dequantised(one).state_dict(), dequantised(many).state_dict())
    assert Checkpoint(one).read("lm_head.weight").dtype == np.float16


def test_memory_holds_a_few_tensors(tmp_path, monkeypatch):
    """One at a time, but for what is made ahead of the writing."""
    monkeypatch.setattr(ahead, "AHEAD", 0)
    adapted = Adapted(
        tmp_path, num_hidden_layers=12, hidden_size=256, intermediate_size=1024, dtype="bfloat16"
    )
    whole = sum(path.stat().st_size for path in adapted.base.glob("*.safetensors"))
    save(adapted, tmp_path / "warm", "fp8_dynamic")
    peaks = {}
    for scheme in SCHEMES:
        tracemalloc.start()
        save(adapted, tmp_path / scheme, scheme)
        peaks[scheme] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    largest = 1024 * 256 * 4  # in float32
    assert whole > 20 * largest
    assert max(peaks.values()) < 4 * largest, peaks
