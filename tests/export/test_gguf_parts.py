"""The pieces of a GGUF file alone: blocks against the gguf package's reference, values, names, pre-tokenizers."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from jaxtune.errors import OptionError, UnsupportedModelError
from jaxtune.export.gguf import pretokenizers, tensors
from jaxtune.export.gguf.folder import size_label
from jaxtune.export.gguf.quants import TensorType, encode
from jaxtune.export.gguf.writer import TensorInfo, write_gguf
from jaxtune.models.config import RopeConfig
from tests.export.byte_level import LLAMA_3
from tests.kit import tiny

RNG = np.random.default_rng(0)
HALVES = np.where(np.arange(32) == 0, 127, np.arange(32) - 15.5).astype(np.float32)  # every code is a tie
VALUES = {
    "normal": RNG.standard_normal((1500, 4096)),  # more than is converted at once
    "heavy tails": RNG.standard_t(3, (64, 256)),
    "of bf16": RNG.standard_normal((64, 256)).astype(ml_dtypes.bfloat16),
    "ties": np.tile(HALVES, (4, 2)) * np.asarray([[1], [-1], [0.5], [3]], np.float32),
    "just below a half": np.tile(
        np.where(np.arange(32), np.nextafter(0.5, 0, dtype=np.float32), 127), (2, 1)
    ),
    "zero blocks": np.where(np.arange(256) < 64, 0, RNG.standard_normal((8, 256))),
    "negative zero": np.full((2, 32), -0.0),
    "tiny": RNG.standard_normal((8, 256)) * 1e-9,
    "large": RNG.standard_normal((8, 256)) * 1e4,
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("type", ["F32", "F16", "BF16", "Q8_0"])
def test_blocks_are_the_gguf_package_s(type, values):
    values = values if values.dtype == ml_dtypes.bfloat16 else values.astype(np.float32)
    with np.errstate(divide="ignore"):
        expected = gguf.quants.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[type])
    np.testing.assert_array_equal(encode(values, TensorType[type], "x"), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize(("type", "value"), [(TensorType.F16, 7e4), (TensorType.Q8_0, 9e6)])
def test_what_a_type_cannot_hold_raises(type, value):
    with pytest.raises(OptionError, match=rf"blk\.0\.ffn_up\.weight holds values that {type.name} cannot"):
        encode(np.full((2, 32), value, np.float32), type, "blk.0.ffn_up.weight")


def test_every_kind_of_value_comes_back(tmp_path):
    metadata = {
        "a.text": "héllo\n🙂", "a.empty": "", "a.yes": True, "a.u32": np.uint32(2**32 - 1), "a.i32": np.int32(-5),
        "a.f32": np.float32(0.1), "a.u64": np.uint64(2**63), "a.f64": np.float64(0.1),
        "a.ints": np.asarray([1, -2, 3], np.int32), "a.texts": ["a", "", "ü"],
    }  # fmt: skip
    infos = [TensorInfo("one", (3,), TensorType.F32), TensorInfo("two", (2, 3, 5), TensorType.F16)]
    arrays = {info.name: np.arange(np.prod(info.shape)).reshape(info.shape) for info in infos}
    encoded = lambda info: encode(arrays[info.name], info.type, info.name)
    write_gguf(tmp_path / "x.gguf", metadata, infos, encoded)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    for name, value in metadata.items():
        read = reader.fields[name].contents()
        assert read == (value.tolist() if isinstance(value, np.ndarray | np.generic) else value), name
    assert reader.fields["GGUF.version"].contents() == 3
    for tensor, info in zip(reader.tensors, infos, strict=True):
        assert (tensor.name, tuple(tensor.shape[::-1])) == (info.name, info.shape)
        np.testing.assert_array_equal(tensor.data.reshape(info.shape), arrays[info.name])
    assert (tmp_path / "x.gguf").stat().st_size % 32 == 0


@pytest.mark.parametrize(
    ("name", "shape", "type"),
    [
        ("token_embd.weight", (384, 64), "Q8_0"),
        ("output.weight", (384, 64), "Q8_0"),
        ("blk.0.ffn_down.weight", (64, 128), "Q8_0"),
        ("blk.0.ffn_up.weight", (64, 80), "F16"),
        ("blk.0.attn_norm.weight", (64,), "F32"),
        ("blk.0.attn_q.bias", (64,), "F32"),
        (tensors.ROPE_FACTORS, (32,), "F32"),
    ],
)
def test_which_type_a_tensor_gets_in_a_q8_0_file(name, shape, type):
    config = tiny.model(rope=RopeConfig(theta=1e4, kind="linear", factor=2.0)).config
    shapes = {} if name == tensors.ROPE_FACTORS else {name: shape}
    (info,) = (info for info in tensors.file_tensors(config, shapes, "q8_0") if info.name == name)
    assert info.type is TensorType[type]


def test_tensors_are_in_the_order_of_the_layers():
    config = tiny.model(windows=(None,) * 11).config
    names = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(11)]
    ordered = tensors.gguf_names(config, [*names, "model.embed_tokens.weight", "lm_head.weight"], "x")
    assert list(ordered)[:3] == ["output.weight", "token_embd.weight", "blk.0.ffn_up.weight"]
    assert list(ordered)[-2:] == ["blk.9.ffn_up.weight", "blk.10.ffn_up.weight"]


def test_a_stored_head_of_a_tied_model_and_stored_frequencies_are_left_out():
    config = tiny.model(tie_word_embeddings=True).config
    stored = ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "model.norm.weight"]
    assert tensors.gguf_names(config, stored, "x") == {"output_norm.weight": "model.norm.weight"}


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"qkv_bias": True}, "qkv_bias without o_bias"),
        ({"windows": (8, 8)}, "windows"),
        ({"qk_norm": "head"}, "qk_norm"),
        ({"fused_projections": True}, "fused_projections"),
        ({"norms": "both", "logit_softcap": 30.0}, "norms, logit_softcap"),
        ({"rope": RopeConfig(theta=1e4, dim=16)}, "partial"),
        (
            {"rope": RopeConfig(theta=1e4, kind="yarn", attention_factor=1.1, original_max_position=8)},
            "scaled",
        ),
        ({"residual_multiplier": 0.5}, "residual_multiplier"),
    ],
)
def test_what_is_more_than_a_llama_is_refused(overrides, what):
    with pytest.raises(UnsupportedModelError, match=what):
        tensors.require_llama(tiny.model(**overrides).config)


def test_a_llama_with_biases_or_stretched_wavelengths_is_one():
    linear = RopeConfig(theta=1e4, kind="linear", factor=2.0)
    config = tiny.model(qkv_bias=True, o_bias=True, mlp_bias=True, rope=linear).config
    tensors.require_llama(config)
    np.testing.assert_allclose(tensors.rope_factors(config), 2.0)


@pytest.mark.parametrize(
    ("numbers", "label"), [(8030261248, "8.0B"), (70553706496, "71B"), (134515008, "135M"), (401_000, "401K")]
)
def test_size_labels(numbers, label):
    assert size_label(numbers) == label


def split(expression):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("written", "name"),
    [
        (split(LLAMA_3), "llama-bpe"),
        (split(LLAMA_3.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "'(?i:[sdmt]|ll|ve|re)")), "llama-bpe"),
        (split(LLAMA_3.replace("{1,3}", "")), "qwen2"),  # cuts every digit
        (split(GPT_2), "gpt-2"),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False), "gpt-2"),
    ],
)
def test_a_pre_tokenizer_is_known_by_what_it_does(written, name):
    assert pretokenizers.recognise(written) == name


@pytest.mark.parametrize(
    "other",
    [
        split(LLAMA_3.replace("{1,3}", "{1,2}")),
        split(LLAMA_3.replace("(?i:", "(?:")),  # small letters only
        split(LLAMA_3.replace(r"[\r\n]*|\s*", r"[\r\n/]*|\s*")),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Metaspace(),
        None,
    ],
)
def test_another_pre_tokenizer_is_refused(other):
    with pytest.raises(UnsupportedModelError, match="llama-bpe, qwen2, gpt-2, smollm"):
        pretokenizers.recognise(other)
