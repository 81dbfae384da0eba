"""An adapter as GGUF: llama.cpp with the base and the adapter gives the logits that we give."""

import dataclasses
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from jaxtune import FastLanguageModel, LanguageModel
from jaxtune.errors import AdapterError, OptionError
from jaxtune.export.gguf import tensors
from jaxtune.export.gguf.adapter import save_adapter_gguf
from jaxtune.lora.tree import layers
from tests.export.llama_cpp import LlamaCpp
from tests.export.test_gguf_families import IDS, PRINTABLE, SIZES, F, S
from tests.kit import families, models
from tests.kit.compare import relative_rms

PROMPT = IDS[:20]
TABLES = r".*\.(q_proj|v_proj)|.*embed_tokens|.*lm_head"
CASES = {
    "llama": ("llama", {}, {}),
    "llama, rsLoRA and patterns": (
        "llama",
        {},
        {
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "mlp.up_proj": 8},
            "alpha_pattern": {"k_proj": 5, "q_proj": 1},
            "layers_to_transform": [1],
        },
    ),
    "llama, embedding and head": ("llama", {"tie_word_embeddings": False}, {"target_modules": TABLES}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 64, "layer_types": [S, S, S, S, S, F, S]}, {}),
    "phi3": ("phi3", {"tie_word_embeddings": False}, {}),
}
"""A case of the families' table, what differs here, and the adapter's settings."""
FAR = {"f32": 1e-4, "f16": 5e-3, "bf16": 3e-2, "q8_0": 3e-2, "auto": 5e-3}
"""Of the adapter's rounding; without the adapter, the logits would be 0.6 to 1.3 away."""


def adapted(case: str, folder: Path) -> LanguageModel:
    base, overrides, settings = CASES[case]
    models.save(families.random_model(base, **{**SIZES, **overrides}), folder)
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    return awake(FastLanguageModel.get_peft_model(model, **{"r": 4, "lora_alpha": 6, **settings}))


def awake(model: LanguageModel) -> LanguageModel:
    """What there is of the adapter moved, and its padding left."""
    rng = np.random.default_rng(0)
    model.lora = jax.tree.map(np.array, model.lora)
    lm = model.causal_lm
    for _, leaves in layers(model.lora, lm.lora_config, lm.module_names):
        for view in leaves.values():
            view += rng.normal(0, 0.1, view.shape)
    return model


def write(model: LanguageModel, folder: Path, method: str = "f32") -> Path:
    lm = model.causal_lm
    return save_adapter_gguf(
        folder, model.lora, lm.lora_config, lm.module_names, lm.config,
        tokenizer=models.tokenizer(), name="somebody/Tiny", quantization_method=method,
    )  # fmt: skip


def write_base(model: LanguageModel, folder: Path) -> Path:
    base = dataclasses.replace(model, lora=None)
    (path,) = base.save_pretrained_gguf(folder, models.tokenizer(), quantization_method="f32")
    return path


def distance(model: LanguageModel, base: Path, adapter: Path) -> float:
    theirs = LlamaCpp(base, adapter).next_logits(PROMPT, models.VOCAB, PRINTABLE)
    ours = np.asarray(model.apply(model.params, model.lora, np.asarray([PROMPT], np.int32)))[0, -1]
    return relative_rms(theirs - theirs.mean(), ours - ours.mean())


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_with_base_and_adapter_gives_our_logits(tmp_path, case):
    model = adapted(case, tmp_path / "base")
    far = distance(model, write_base(model, tmp_path / "base"), write(model, tmp_path / "adapter"))
    assert far < (2e-3 if "gemma" in case else 1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[LanguageModel, Path]:
    """With an adapter, and the base as GGUF."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    model = adapted("llama", folder)
    return model, write_base(model, folder)


@pytest.mark.parametrize("method", FAR)
def test_every_type_is_close(tmp_path, llama, method):
    """q8_0 in A: in B, whose rows are of the rank, float16."""
    model, base = llama
    path = write(model, tmp_path / "adapter", method)
    assert distance(model, base, path) < FAR[method]
    types = {tensor.name[-6:]: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    asked = "F16" if method == "auto" else method.upper()
    assert types == {"lora_a": asked, "lora_b": "F16" if method == "q8_0" else asked}


def test_the_comparison_sees_rows_as_they_are(tmp_path, monkeypatch, llama):
    model, base = llama
    monkeypatch.setattr(tensors, "as_stored", lambda architecture, c, name, array: array)
    assert distance(model, base, write(model, tmp_path / "adapter")) > 0.05


def test_what_it_says_of_itself(tmp_path, llama):
    fields = gguf.GGUFReader(write(llama[0], tmp_path / "adapter")).fields
    said = {
        name: fields[name].contents()
        for name in ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora", "adapter.lora.alpha": 6.0
    }  # fmt: skip


def test_a_modelfile_adds_it_to_a_base(tmp_path, llama):
    write(llama[0], tmp_path / "adapter", "f16")
    lines = (tmp_path / "adapter" / "Modelfile").read_text().splitlines()
    assert lines[1:3] == ["FROM ./Tiny.gguf", "ADAPTER ./Tiny-lora.F16.gguf"]
    assert 'PARAMETER stop "<|end|>"' in lines


BEYOND = {
    "use_dora=True": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "bias='all'": {"bias": "all"},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "one table": {"target_modules": TABLES},
}
"""What llama.cpp has no form for; of the last it makes an abort."""


@pytest.mark.parametrize("said", BEYOND)
def test_what_it_cannot_hold(tmp_path, said):
    folder = models.save(models.random_llama(tie_word_embeddings=True), tmp_path / "base")
    model, _ = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    model = FastLanguageModel.get_peft_model(model, r=4, **BEYOND[said])
    with pytest.raises(AdapterError, match=said) as error:
        write(model, tmp_path / "adapter")
    assert "save_pretrained_gguf" in error.value.fix
    assert not (tmp_path / "adapter").exists()


def test_a_type_of_whole_models(tmp_path, llama):
    with pytest.raises(OptionError, match="'q4_k_m' for an adapter"):
        write(llama[0], tmp_path / "adapter", "q4_k_m")
