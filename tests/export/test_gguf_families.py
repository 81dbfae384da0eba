"""Every family as a GGUF: llama.cpp gives the logits of transformers, and writes what transformers writes."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from jaxtune.export.gguf import ropes, tensors
from jaxtune.export.gguf.architectures import architecture_of
from jaxtune.export.gguf.folder import save_gguf
from jaxtune.export.merge import Trained
from jaxtune.loading.config import read_config
from jaxtune.models import names
from jaxtune.models.families import FAMILIES
from tests.export.llama_cpp import LlamaCpp
from tests.kit import families, models, published
from tests.kit.compare import relative_rms

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
"""Rows that blocks of 256 fill."""
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": list(np.linspace(1, 1.6, 16)),
    "long_factor": list(np.linspace(1, 12, 16)),
    "partial_rotary_factor": 0.5,
}
S, F = "sliding_attention", "full_attention"
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}

CASES = {
    "mistral": ("mistral nemo", {**UNTIED, "head_dim": 32}, "llama"),
    "mistral, window": ("mistral, window", {**UNTIED, "sliding_window": 80}, "llama"),
    "qwen2": ("qwen2", TIED, "qwen2"),
    "qwen2, wide heads": ("qwen2", {**TIED, "head_dim": 96}, "llama"),
    "qwen2, untied, yarn": ("qwen2", {**UNTIED, "rope_parameters": YARN}, "qwen2"),
    "qwen3": ("qwen3", {**TIED, "head_dim": 32}, "qwen3"),
    "qwen3, untied": ("qwen3", UNTIED, "qwen3"),
    "gemma": ("gemma", {"head_dim": 32, "num_key_value_heads": 1}, "gemma"),
    "gemma2": (
        "gemma2",
        {"query_pre_attn_scalar": 64, "layer_types": [S, F, S, F, S], "attn_logit_softcapping": 5.0},
        "gemma2",
    ),
    "gemma3": (
        "gemma3_text",
        {"query_pre_attn_scalar": 64, "layer_types": [S, S, S, S, S, F, S], "final_logit_softcapping": 5.0},
        "gemma3",
    ),
    "phi3": ("phi3", UNTIED, "phi3"),
    "phi4-mini, within its original context": (
        "phi4-mini",
        {
            **TIED,
            "rope_parameters": LONG,
            "original_max_position_embeddings": 256,
            "max_position_embeddings": 512,
        },
        "phi3",
    ),
    "phi4-mini, beyond": ("phi4-mini", {**TIED, "rope_parameters": LONG}, "phi3"),
    "granite": ("granite", TIED, "granite"),
    "granite, untied, llama 3's rope": (
        "granite",
        {**UNTIED, "rope_parameters": models.LLAMA3_ROPE, "attention_bias": False},
        "granite",
    ),
    "olmo2": ("olmo2", {}, "olmo2"),
    "smollm3": ("smollm3", {**TIED, "num_hidden_layers": 5, "no_rope_layer_interval": 4}, "smollm3"),
}
"""A case of the families' table, what differs here, and llama.cpp's architecture."""

LENGTHS = (1, 9, 33, 70)
"""Of the prompts whose next token is compared: within and beyond windows and original contexts."""
BEYOND = 120
IDS = np.random.default_rng(0).integers(5, 300, BEYOND).tolist()
PRINTABLE = models.tokenizer().convert_tokens_to_ids("b")
GREEDY = 8
FAR = {"q8_0": 0.2, "q4_k_m": 1.0}
"""Of random weights, of which trained ones lose a fraction; logits of something else would be 1.4 away."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More wait for one another longer than so small a model takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def export(model, folder: Path, methods: list[str]) -> list[Path]:
    base = models.save(model, folder / "base")
    hf = read_config(base)
    config = FAMILIES[hf["model_type"]](hf)
    module_names = lambda path: names.hf_names(config, path)
    return save_gguf(
        folder / "out", Trained(base, config, module_names),
        tokenizer=models.tokenizer(), name="somebody/Tiny", quantization_method=methods,
    )  # fmt: skip


def made(case: str):
    base, overrides, architecture = CASES[case]
    return families.random_model(base, **{**SIZES, **overrides}), architecture


def logits_of(model: torch.nn.Module | LlamaCpp, ids: list[int]) -> np.ndarray:
    """Of the next token, up to the constant that softmax ignores."""
    if isinstance(model, LlamaCpp):
        logits = model.next_logits(ids, models.VOCAB, PRINTABLE)
    else:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].numpy()
    return logits - logits.mean()


def distance(model, llama_cpp: LlamaCpp, lengths=LENGTHS) -> float:
    theirs, ours = (np.stack([logits_of(each, IDS[:n]) for n in lengths]) for each in (llama_cpp, model))
    return relative_rms(theirs, ours)


def greedy(model: torch.nn.Module | LlamaCpp) -> list[int]:
    ids = IDS[: max(LENGTHS)]
    for _ in range(GREEDY):
        ids.append(int(logits_of(model, ids).argmax()))
    return ids[max(LENGTHS) :]


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_the_logits_of_transformers(tmp_path, case):
    model, architecture = made(case)
    full, half, eight, four = export(model, tmp_path, ["f32", "f16", "q8_0", "q4_k_m"])
    reader = gguf.GGUFReader(full)
    assert reader.fields["general.architecture"].contents() == architecture
    has_head = "output.weight" in {tensor.name for tensor in reader.tensors}
    assert has_head is not model.config.tie_word_embeddings
    llama_cpp = LlamaCpp(full)
    # llama.cpp decides by the context that it was started with, transformers by the text.
    lengths = (max(LENGTHS),) if "beyond" in case else LENGTHS
    assert distance(model, llama_cpp, lengths) < (2e-3 if "gemma" in case else 1e-4)
    assert greedy(llama_cpp) == greedy(model)
    assert distance(model, LlamaCpp(half), lengths) < 5e-3
    assert distance(model, LlamaCpp(eight), lengths) < FAR["q8_0"]
    assert distance(model, LlamaCpp(four), lengths) < FAR["q4_k_m"]


MISTAKES = {
    "rows of q and k as they are": (
        "granite",
        tensors,
        "as_stored",
        lambda architecture, c, name, array: array,
    ),
    "norms without their one": ("gemma2", tensors, "as_stored", lambda architecture, c, name, array: array),
    "no long factors": ("phi4-mini, beyond", ropes, "tensors", lambda c: {}),
    "no stretched wavelengths": ("granite, untied, llama 3's rope", ropes, "tensors", lambda c: {}),
    "no end of the context where a window begins": (
        "mistral, window",
        tensors,
        "_context_length",
        lambda architecture, c: c.max_position,
    ),
    "one rope for all layers": (
        "gemma3",
        ropes,
        "keys",
        lambda architecture, c: {"freq_base": np.float32(1e5)},
    ),
}
"""What is left out: a case that has it, and what to put in the place of what writes it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_sees_a_mistake(tmp_path, monkeypatch, mistake):
    case, module, function, without = MISTAKES[mistake]
    monkeypatch.setattr(module, function, without)
    model, _ = made(case)
    (full,) = export(model, tmp_path, ["f32"])
    assert distance(model, LlamaCpp(full), (BEYOND,)) > 0.05


PUBLISHED = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2", "granite": "granite", "smollm3": "smollm3",
}  # fmt: skip


def architecture_of_settings(settings: dict, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(settings))
    hf = read_config(folder)
    return architecture_of(FAMILIES[hf["model_type"]](hf)).name


@pytest.mark.parametrize("model", published.FACTS)
def test_published_models_have_an_architecture(tmp_path, model):
    settings = published.FACTS[model].config
    assert architecture_of_settings(settings, tmp_path) == PUBLISHED[settings["model_type"]]


OF_FAMILIES = [
    folder
    for folder in published.folders("config.json")
    if json.loads((folder / "config.json").read_text())["model_type"] in PUBLISHED
]


@pytest.mark.parametrize("folder", OF_FAMILIES, ids=lambda folder: folder.name)
def test_published_configs_have_an_architecture(tmp_path, folder):
    settings = json.loads((folder / "config.json").read_text())
    assert architecture_of_settings(settings, tmp_path) == PUBLISHED[settings["model_type"]]
