"""A GGUF file of ours as others see it: llama.cpp computes logits and cuts texts, the gguf package reads it."""

import re

import gguf
import ml_dtypes
import numpy as np
import pytest

from jaxtune import get_chat_template
from jaxtune.export.gguf import ropes, tensors
from jaxtune.export.gguf.architectures import architecture_of
from jaxtune.export.gguf.mixtures import MIXTURES, tensor_types
from jaxtune.export.gguf.quants import encode
from jaxtune.loading.checkpoint import Checkpoint
from tests.export.adapted import IDS, Adapted
from tests.export.byte_level import NASTY, SPECIALS, VOCAB, byte_level
from tests.export.imatrix import write_gguf as write_imatrix
from tests.export.llama_cpp import LlamaCpp
from tests.export.test_gguf_quants import ERROR
from tests.kit import models
from tests.kit.compare import relative_rms

LENGTHS = (1, 2, 9, 33, 70, 100)
"""Of the prompts whose next token is compared: within and beyond Llama 3's original context of 32."""
PRINTABLE = models.tokenizer().convert_tokens_to_ids("b")
ARCHITECTURES = {
    "llama 3": {},
    "tied, plain rotary": {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    },
    "biases, as many kv heads": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8},
    "wide heads": {"head_dim": 32, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("gguf"))


def centred(logits):
    return logits - logits.mean(axis=-1, keepdims=True)


def distance(adapted, file):
    """llama.cpp's logits against jaxtune's "base + adapter", both up to the constant that softmax ignores."""
    llama_cpp = LlamaCpp(file)
    vocab = adapted.logits.shape[-1]
    theirs = [llama_cpp.next_logits(IDS[0, :length].tolist(), vocab, PRINTABLE) for length in LENGTHS]
    ours = [adapted.logits[0, length - 1] for length in LENGTHS]
    return relative_rms(centred(np.stack(ours)), centred(np.stack(theirs)))


def fields(file):
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("overrides", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_llama_cpp_gives_the_merged_logits(tmp_path, overrides):
    adapted = Adapted(tmp_path, **overrides)
    full, half = adapted.save_gguf(tmp_path / "out", ["f32", "f16"])
    assert distance(adapted, full) < 1e-4
    assert distance(adapted, half) < 5e-3


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": r".*(q_proj|embed_tokens|lm_head)"},
    ],
    ids=["whole", "low-rank"],
)
def test_a_head_that_was_trained_apart_from_the_embedding(tmp_path, lora):
    """The file of a tied model then has both; and DoRA's lengths are in its weights."""
    adapted = Adapted(tmp_path, lora=lora, tie_word_embeddings=True)
    (full,) = adapted.save_gguf(tmp_path / "out")
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(full).tensors}
    assert distance(adapted, full) < 1e-4


def test_q8_0_is_close(llama_3, tmp_path):
    (file,) = llama_3.save_gguf(tmp_path / "out", "q8_0")
    assert distance(llama_3, file) < 0.1


@pytest.mark.parametrize("mistake", ["rows of q and k as they are", "no stretched wavelengths"])
def test_the_comparison_sees_a_mistake(llama_3, tmp_path, monkeypatch, mistake):
    if mistake == "rows of q and k as they are":
        monkeypatch.setattr(tensors, "as_stored", lambda architecture, config, name, array: array)
    else:
        monkeypatch.setattr(ropes, "tensors", lambda config: {})
    (file,) = llama_3.save_gguf(tmp_path / "out")
    assert distance(llama_3, file) > 0.05


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "smollm"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(tmp_path, kind):
    adapted = Adapted(tmp_path, adapter=False, vocab_size=VOCAB, num_hidden_layers=1)
    tokenizer = byte_level(kind)
    (file,) = adapted.save_gguf(tmp_path / "out", tokenizer=tokenizer)
    llama_cpp = LlamaCpp(file)
    assert fields(file)["tokenizer.ggml.pre"] == kind
    differ = {text: (llama_cpp.tokenize(text), tokenizer(text)["input_ids"]) for text in NASTY}
    assert not {text: ids for text, ids in differ.items() if ids[0] != ids[1]}


@pytest.mark.parametrize("kind", ["tekken", "gpt-4o"])
def test_where_llama_cpp_cuts_nearly_as_the_tokenizer_does(tmp_path, caplog, kind):
    adapted = Adapted(tmp_path, adapter=False, vocab_size=VOCAB, num_hidden_layers=1)
    tokenizer = byte_level(kind)
    (file,) = adapted.save_gguf(tmp_path / "out", tokenizer=tokenizer)
    assert f"{kind!r} cuts words otherwise" in caplog.text
    llama_cpp = LlamaCpp(file)
    assert fields(file)["tokenizer.ggml.pre"] == kind
    differ = [text for text in NASTY if llama_cpp.tokenize(text) != tokenizer(text)["input_ids"]]
    assert differ == ["नमस्ते क्षि"]


def test_the_vocabulary(tmp_path):
    adapted = Adapted(tmp_path, adapter=False, vocab_size=VOCAB, num_hidden_layers=1)
    tokenizer = get_chat_template(byte_level("llama-bpe"), "llama-3.1")
    found = fields(adapted.save_gguf(tmp_path / "out", tokenizer=tokenizer)[0])
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB > len(tokenizer)
    control, user_defined, unused = (gguf.TokenType[name] for name in ("CONTROL", "USER_DEFINED", "UNUSED"))
    assert [tokens[n] for n, kind in enumerate(types) if kind == control] == SPECIALS
    assert [tokens[n] for n, kind in enumerate(types) if kind == user_defined] == ["<think>"]
    assert [n for n, kind in enumerate(types) if kind == unused] == list(range(len(tokenizer), VOCAB))
    assert tokens[-1] == f"[PAD{VOCAB - 1}]"
    for name in ("bos", "eos"):
        assert found[f"tokenizer.ggml.{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    assert found["tokenizer.ggml.padding_token_id"] == tokenizer.pad_token_id
    assert tokenizer.eos_token == "<|eot_id|>"
    assert "tokenizer.ggml.eot_token_id" not in found
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.chat_template"] == tokenizer.chat_template


def test_a_turn_that_does_not_end_with_eos_has_its_own_end(tmp_path):
    adapted = Adapted(tmp_path, adapter=False, vocab_size=VOCAB, num_hidden_layers=1)
    tokenizer = get_chat_template(byte_level("gpt-2"), "chatml", map_eos_token=False)
    found = fields(adapted.save_gguf(tmp_path / "out", tokenizer=tokenizer)[0])
    assert found["tokenizer.ggml.eos_token_id"] == SPECIALS.index("<|end_of_text|>")
    assert found["tokenizer.ggml.eot_token_id"] == SPECIALS.index("<|im_end|>")
    assert found["tokenizer.ggml.add_bos_token"] is False


def test_the_gguf_package_reads_it(llama_3, tmp_path):
    file = llama_3.save_gguf(tmp_path / "out")[0]
    merged = Checkpoint(llama_3.save_merged(tmp_path / "merged"))
    reader = gguf.GGUFReader(file)
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    expected = {theirs.get_name(name, (".weight",)): name for name in merged.names}
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found.keys() == expected.keys() | {"rope_freqs.weight"}
    for name, hf_name in expected.items():
        shape = merged.shape(hf_name)
        assert tuple(found[name].shape) == shape[::-1], "fastest dimension first"
        assert found[name].tensor_type == gguf.GGMLQuantizationType.F32
        if "attn_q" not in name and "attn_k" not in name:
            np.testing.assert_array_equal(found[name].data.reshape(shape), merged.read(hf_name))
        assert found[name].data_offset % 32 == 0
    read = fields(file)
    config = llama_3.model.causal_lm.config
    assert read["general.architecture"] == "llama"
    assert read["general.name"] == "Tiny-Llama"
    assert read["general.file_type"] == gguf.LlamaFileType.ALL_F32
    assert read["llama.block_count"] == 2
    assert read["llama.attention.head_count_kv"] == config.num_kv_heads
    assert read["llama.context_length"] == config.max_position


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """Wide enough for blocks of 256."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 1}
    return Adapted(tmp_path_factory.mktemp("wide"), **wide)


@pytest.fixture(scope="module")
def importance(wide_llama, tmp_path_factory):
    """Of the columns of every weight, and the file that says it."""
    rng = np.random.default_rng(0)
    config = wide_llama.model.causal_lm.config
    with Checkpoint(wide_llama.base) as base:
        names = tensors.gguf_names(config, base.names, "x")
        shapes = {name: base.shape(names[name]) for name in names if "norm" not in name}
    found = {name: rng.uniform(0.5, 2, (1, shape[-1])).astype(np.float32) for name, shape in shapes.items()}
    ones = {name: np.ones((1, 1), np.float32) for name in found}
    return found, write_imatrix(tmp_path_factory.mktemp("imatrix") / "imatrix.gguf", found, ones)


@pytest.fixture(scope="module")
def every_file(wide_llama, importance, tmp_path_factory):
    """By method; with an importance matrix those that need one."""
    files = {}
    for needed in (False, True):
        methods = [method for method, mixture in MIXTURES.items() if mixture.needs_importance is needed]
        folder = tmp_path_factory.mktemp("gguf") / "out"
        made = wide_llama.save_gguf(folder, methods, imatrix_file=importance[1] if needed else None)
        files |= dict(zip(methods, made, strict=True))
    return files


@pytest.mark.parametrize("method", MIXTURES)
def test_a_file_holds_the_merged_weights_in_the_types_of_its_method(
    wide_llama, importance, every_file, method
):
    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(every_file["f32"]).tensors}
    shapes = {name: tuple(tensor.shape[::-1].tolist()) for name, tensor in exact.items()}
    weighted = MIXTURES[method].needs_importance
    config = wide_llama.model.causal_lm.config
    layout = tensors.layout(architecture_of(config), config)
    types = tensor_types(method, shapes, layout, weighted=weighted)
    reader = gguf.GGUFReader(every_file[method])
    assert {tensor.name: tensor.tensor_type for tensor in reader.tensors} == types
    for tensor in reader.tensors:
        values = exact[tensor.name].data.reshape(shapes[tensor.name])
        columns = importance[0][tensor.name][0] if weighted and values.ndim == 2 else None
        expected = encode(values, types[tensor.name], tensor.name, columns)
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name
        back = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(values.shape)
        assert relative_rms(back, values) <= 1.1 * ERROR.get(types[tensor.name].name, 4e-3), tensor.name
    assert fields(every_file[method])["general.file_type"] == MIXTURES[method].file_type


FAR = {32: 1e-4, 16: 0.02, 8: 0.04, 6: 0.1, 5: 0.2, 4: 0.35, 3: 0.65, 2: 0.95, 1: 1.1}
"""By bits: how far from the merged logits. These are random weights, of which trained ones lose a fraction; logits of
something else would be 1.4 away."""


@pytest.mark.parametrize("method", MIXTURES)
def test_llama_cpp_runs_every_method(wide_llama, every_file, method):
    bits = int(re.search(r"\d+", method)[0])
    assert distance(wide_llama, every_file[method]) < FAR[bits]


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("quantized", "Q4_K_M"),
        ("q4_k", "Q4_K_M"),
        ("q5_k", "Q5_K_M"),
        ("q3_k_xs", "Q3_K_S"),
        (None, "Q8_0"),
        (["q3_k_s", "q3_k_xs", "q3_k"], "Q3_K_S Q3_K_M"),
    ],
)
def test_other_names_of_methods(tmp_path, asked, written):
    adapted = Adapted(tmp_path, adapter=False, num_hidden_layers=1)
    made = adapted.save_gguf(tmp_path / "out", asked)
    assert [path.name for path in made] == [f"Tiny-Llama.{method}.gguf" for method in written.split()]


@pytest.mark.parametrize(("stored", "method"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F16")])
def test_aliases(tmp_path, stored, method):
    adapted = Adapted(tmp_path, dtype=stored, adapter=False, num_hidden_layers=1)
    made = adapted.save_gguf(tmp_path / "out", ["not_quantized", "fast_quantized", "q8_0"])
    assert [path.name for path in made] == [f"Tiny-Llama.{method}.gguf", "Tiny-Llama.Q8_0.gguf"]
    assert {path.name for path in (tmp_path / "out_gguf").iterdir()} == {"Modelfile"} | {p.name for p in made}
    base = Checkpoint(adapted.base)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(made[0]).tensors}
    if stored != "float32":
        name = "model.layers.0.mlp.down_proj.weight"
        assert found["blk.0.ffn_down.weight"].data.tobytes() == base.read(name).tobytes()
        assert base.dtype(name) in (np.float16, ml_dtypes.bfloat16)


def test_a_second_method_joins_the_first(llama_3, tmp_path):
    llama_3.save_gguf(tmp_path / "out", None)
    llama_3.save_gguf(tmp_path / "out", "f16")
    found = {path.name for path in (tmp_path / "out_gguf").iterdir()}
    assert found == {"Modelfile", "Tiny-Llama.Q8_0.gguf", "Tiny-Llama.F16.gguf"}
