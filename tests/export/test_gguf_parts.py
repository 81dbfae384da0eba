"""The pieces of a GGUF file alone: blocks against the gguf package's reference, values, names, pre-tokenizers."""

import gguf
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from jaxtune.errors import OptionError, UnsupportedModelError
from jaxtune.export.gguf import pretokenizers, ropes, tensors
from jaxtune.export.gguf.architectures import architecture_of
from jaxtune.export.gguf.folder import size_label
from jaxtune.export.gguf.quants import TensorType, encode
from jaxtune.export.gguf.writer import TensorInfo, write_gguf
from jaxtune.models.config import RopeConfig
from jaxtune.models.rope import frequencies
from tests.export.byte_level import GPT_4O, LLAMA_3, TEKKEN
from tests.kit import tiny

LLAMA_3_ROPE = RopeConfig(
    theta=1e4, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=32
)
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
        (ropes.FACTORS, (16,), "F32"),
    ],
)
def test_which_type_a_tensor_gets_in_a_q8_0_file(name, shape, type):
    config = tiny.model(rope=LLAMA_3_ROPE).config
    shapes = {} if name == ropes.FACTORS else {name: shape}
    infos = tensors.file_tensors(architecture_of(config), config, shapes, "q8_0")
    (info,) = (info for info in infos if info.name == name)
    assert (info.shape, info.type) == (shape, TensorType[type])


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


GEMMA = {
    "norm_adds_one": True, "activation": "gelu_tanh", "embedding_multiplier": 128**0.5, "tie_word_embeddings": True,
}  # fmt: skip
DYNAMIC = RopeConfig(theta=1e4, kind="dynamic", factor=2.0, original_max_position=32, length=64)
YARN = RopeConfig(theta=1e4, kind="yarn", factor=4.0, attention_factor=1.3, original_max_position=32)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ({"qk_norm": "head", "o_bias": True}, "qwen3 but for o_bias=True"),
        ({"norms": "both", "logit_softcap": 30.0}, "norms='both'"),
        (
            {"attention_multiplier": 0.5, "qk_norm": "head"},
            r"qwen3 but for scores multiplied by 0.5 \(not 0.1768\)",
        ),
        ({"rope": RopeConfig(theta=1e4, dim=16)}, "a rotary embedding of 16 of 32 numbers"),
        ({"rope": DYNAMIC, "qk_norm": "head"}, "qwen3 but for a rotary embedding of the kind 'dynamic'"),
        ({"head_dim": 48, "fused_projections": True}, "phi3 but for 4 heads of 48 in a width of 128"),
        ({**GEMMA, "tie_word_embeddings": False}, "gemma but for a head of its own"),
        ({**GEMMA, "embedding_multiplier": 3.0}, "embedding_multiplier=3.0"),
        ({**GEMMA, "norms": "both", "attention_softcap": 50.0, "windows": (8, None)}, "logit_softcap=None"),
        (
            {
                **GEMMA,
                "norms": "both",
                "attention_softcap": 50.0,
                "logit_softcap": 30.0,
                "windows": (None, 8),
            },
            "gemma2 but for windows in other layers",
        ),
    ],
)
def test_what_no_architecture_computes_is_refused(overrides, what):
    with pytest.raises(UnsupportedModelError, match=what):
        architecture_of(tiny.model(**overrides).config)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"qkv_bias": True, "o_bias": True, "mlp_bias": True, "rope": DYNAMIC}, "llama"),
        ({"windows": (8, 8)}, "llama"),
        ({"qkv_bias": True, "windows": (None, 8)}, "qwen2"),
        ({"qkv_bias": True, "head_dim": 48}, "llama"),
        ({"residual_multiplier": 0.5}, "granite"),
        (GEMMA, "gemma"),
    ],
)
def test_which_architecture_a_model_is(overrides, name):
    assert architecture_of(tiny.model(**overrides).config).name == name


def test_gemmas_of_27b_scale_scores_by_another_width():
    """By layers llama.cpp knows them: 4608 / 32 = 144 in Gemma 2, where heads have 128 numbers."""
    capped = {"norms": "both", "attention_softcap": 50.0, "logit_softcap": 30.0}
    of = lambda layers: tiny.model(
        **GEMMA, **capped, windows=(8, None) * (layers // 2), num_heads=2, attention_multiplier=64**-0.5
    )
    assert architecture_of(of(46).config).name == "gemma2"
    with pytest.raises(UnsupportedModelError, match="scores multiplied"):
        architecture_of(of(42).config)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (tiny.ROPE, {}),
        (
            RopeConfig(theta=1e4, kind="linear", factor=2.0),
            {"scaling.type": "linear", "scaling.factor": 2.0},
        ),
        (
            YARN,
            {
                "scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32,
                "scaling.attn_factor": np.float32(1.3 / 1.1386294),
            },
        ),
        (LLAMA_3_ROPE, {}),
    ],
)  # fmt: skip
def test_what_a_file_says_of_its_rope(rope, expected):
    config = tiny.model(rope=rope).config
    found = ropes.keys(architecture_of(config), config)
    assert found == {"dimension_count": 32, "freq_base": 1e4, **expected}
    assert set(ropes.tensors(config)) == ({ropes.FACTORS} if rope is LLAMA_3_ROPE else set())


def test_factors_slow_the_frequencies():
    config = tiny.model(rope=LLAMA_3_ROPE).config
    factors = ropes.tensors(config)[ropes.FACTORS]
    np.testing.assert_allclose(frequencies(tiny.ROPE, 32) / factors, frequencies(LLAMA_3_ROPE, 32), rtol=1e-6)
    np.testing.assert_allclose(factors[[0, -1]], [1, 8])


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
        (split(TEKKEN), "tekken"),
        (split(GPT_4O), "gpt-4o"),
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
