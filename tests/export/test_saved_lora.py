"""`save_lora` and `load_lora`: an adapter beside the model's own."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxtune import FastLanguageModel
from jaxtune.errors import AdapterError, OptionError
from tests.export.adapted import IDS, Adapted
from tests.kit import models
from tests.kit.compare import assert_trees_equal, relative_rms

PROMPT = {"input_ids": IDS[:, :9], "max_new_tokens": 12}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Adapted:
    return Adapted(tmp_path_factory.mktemp("lora"))


def without(model):
    """The base, with an adapter of other settings that changes nothing."""
    base = dataclasses.replace(
        model, lora=None, causal_lm=dataclasses.replace(model.causal_lm, lora_config=None)
    )
    return FastLanguageModel.get_peft_model(base, r=2, lora_alpha=1, target_modules=["q_proj"])


def test_what_is_loaded_answers_as_what_was_saved(made, tmp_path):
    """Its own settings hold, not those of the model's own adapter, which stays."""
    made.model.save_lora(tmp_path / "saved")
    other = without(made.model)
    request = other.load_lora(tmp_path / "saved")
    assert_trees_equal(request.lora, made.model.lora)
    np.testing.assert_array_equal(
        other.generate(**PROMPT, lora_request=request), made.model.generate(**PROMPT)
    )
    logits = request.causal_lm.apply(other.params, request.lora, IDS)
    assert relative_rms(logits, made.logits) < 1e-6
    assert relative_rms(other.apply(other.params, other.lora, IDS), made.logits) > 0.1


def test_names_of_unsloth_are_taken(made, tmp_path):
    made.model.save_lora(tmp_path / "saved")
    made.model.load_lora(str(tmp_path / "saved"), load_tensors=True, lora_request_id=3)


def test_an_adapter_of_another_base_is_said(made, tmp_path, caplog):
    renamed = dataclasses.replace(made.model, name_or_path="somebody/else")
    renamed.save_lora(tmp_path / "saved")
    made.model.load_lora(tmp_path / "saved")
    assert "was trained on somebody/else" in caplog.text


def test_what_does_not_fit(made, tmp_path):
    larger = models.save(models.random_llama(intermediate_size=192), tmp_path / "larger")
    larger = FastLanguageModel.from_pretrained(larger, dtype="float32", load_in_4bit=False)[0]
    made.model.save_lora(tmp_path / "saved")
    with pytest.raises(AdapterError, match="has the shape"):
        larger.load_lora(tmp_path / "saved")
    with pytest.raises(OptionError, match="of another model"):
        larger.generate(**PROMPT, lora_request=made.model.load_lora(tmp_path / "saved"))
    with pytest.raises(OptionError, match="is a str"):
        made.model.generate(**PROMPT, lora_request="saved")
    with pytest.raises(AdapterError, match="holds no adapter"):
        made.model.load_lora(made.base)
    with pytest.raises(AdapterError, match="has no adapter"):
        larger.save_lora(tmp_path / "none")


def test_an_adapter_that_changed_its_base(made, tmp_path):
    """PiSSA: the part that the adapter began as is no longer in the base. Only that very model takes it back."""
    base, _ = FastLanguageModel.from_pretrained(made.base, dtype="float32", load_in_4bit=False)
    pissa = FastLanguageModel.get_peft_model(base, r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    pissa.save_lora(tmp_path / "pissa")
    made.model.save_lora(tmp_path / "plain")
    request = pissa.load_lora(tmp_path / "pissa")
    assert_trees_equal(request.lora, jax.tree.map(np.asarray, pissa.lora))
    for model, folder in ((made.model, "pissa"), (pissa, "plain")):
        with pytest.raises(AdapterError, match="'pissa'"):
            model.load_lora(tmp_path / folder)


def test_an_adapter_with_tokens_of_its_own(made, tmp_path):
    from jaxtune import add_new_tokens

    model, tokenizer = FastLanguageModel.from_pretrained(made.base, dtype="float32", load_in_4bit=False)
    add_new_tokens(model, tokenizer, ["<new>"])
    model = FastLanguageModel.get_peft_model(model, r=4)
    model.save_lora(tmp_path / "saved")
    assert_trees_equal(model.load_lora(tmp_path / "saved").lora, model.lora)
    with pytest.raises(AdapterError, match="an embedding or a head of its own"):
        made.model.load_lora(tmp_path / "saved")
