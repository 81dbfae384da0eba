"""Our own importance matrix: what goes into every linear, against hooks on transformers' modules."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel, errors
from jaxtune.export.gguf.calibration import contexts_of
from jaxtune.export.gguf.imatrix import read_imatrix
from tests.export.adapted import Adapted
from tests.kit import families, models
from tests.kit.compare import assert_close, relative_rms

TEXTS = [f"The {i}th of so many lines, each of which says a little." for i in range(60)]
NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down", "qkv_proj": "attn_qkv", "gate_up_proj": "ffn_up",
}  # fmt: skip


def hooked(model: torch.nn.Module, ids: np.ndarray) -> dict[str, np.ndarray]:
    """GGUF name -> mean square of each input column."""
    means = {}

    def hook(name, inputs):
        means[name] = (inputs[0].detach().double() ** 2).mean(dim=(0, 1)).numpy()

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path.startswith("model.layers."):
            _, _, layer, _, kind = path.split(".")
            name = f"blk.{layer}.{NAMES[kind]}.weight"
            module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
    with torch.no_grad():
        model(torch.from_numpy(ids).long())
    return means


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, means in expected.items():
        assert_close(found[name], means, 1e-4, name)


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_it_is_what_goes_into_transformers_linears(tmp_path, family):
    theirs = families.random_model(family)
    folder = models.save(theirs, tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_4bit=False)
    model.save_imatrix(tmp_path / "x.gguf", TEXTS, tokenizer, context=64)
    contexts = contexts_of(TEXTS, tokenizer, 64)
    assert len(contexts) > 5
    assert_same(read_imatrix(tmp_path / "x.gguf"), hooked(theirs, contexts))


def test_with_an_adapter_it_is_the_merged_model_s(tmp_path):
    adapted = Adapted(tmp_path, num_hidden_layers=2)
    adapted.model.save_imatrix(tmp_path / "x.gguf", TEXTS, adapted.tokenizer, context=64)
    merged = AutoModelForCausalLM.from_pretrained(adapted.save_merged(tmp_path / "m"), dtype=torch.float32)
    contexts = contexts_of(TEXTS, adapted.tokenizer, 64)
    found = read_imatrix(tmp_path / "x.gguf")
    assert_same(found, hooked(merged, contexts))
    before = hooked(AutoModelForCausalLM.from_pretrained(adapted.base, dtype=torch.float32), contexts)
    assert relative_rms(found["blk.1.ffn_down.weight"], before["blk.1.ffn_down.weight"]) > 1e-2
    field = gguf.GGUFReader(tmp_path / "x.gguf").fields["imatrix.chunk_count"]
    assert field.parts[field.data[0]][0] == len(contexts)
    adapted.save_gguf(tmp_path / "out", "iq3_xxs", imatrix_file=tmp_path / "x.gguf")


def test_contexts_begin_as_a_text_does(tmp_path):
    tokenizer = models.fresh_tokenizer()
    contexts = contexts_of(TEXTS, tokenizer, 32)
    ids = [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False).input_ids]
    start = tokenizer("").input_ids
    assert contexts.shape[1] == 32
    np.testing.assert_array_equal(contexts[0], [*start, *ids[: 32 - len(start)]])
    assert len(contexts) == len(ids) // (32 - len(start))


@pytest.mark.parametrize(
    ("texts", "found"), [([], "There is no text"), (None, "There is no text"), ([{"a": 1}], "hold a dict")]
)
def test_what_is_no_text(texts, found):
    with pytest.raises(errors.DatasetError, match=found):
        contexts_of(texts, models.fresh_tokenizer(), 32)


def test_too_little_text(tmp_path):
    with pytest.raises(errors.DatasetError, match="The text has 1 token"):
        contexts_of("a", models.fresh_tokenizer(), 512)
    with pytest.raises(errors.OptionError, match="context=1"):
        contexts_of(TEXTS, models.fresh_tokenizer(), 1)
