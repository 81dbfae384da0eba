"""add_new_tokens: the tokenizer and both tables grow, old tokens keep their logits, new rows lie among the trained."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtune import FastLanguageModel, add_new_tokens
from jaxtune.errors import AdapterError, OptionError
from tests.export.llama_cpp import LlamaCpp
from tests.kit import models
from tests.kit.compare import assert_close, assert_trees_equal

NEW = ["<think>", "quick fox"]
TOKENS = jnp.arange(12)[None]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    theirs = models.random_llama(tie_word_embeddings=request.param)
    return models.save(theirs, tmp_path_factory.mktemp("new") / "model")


def load(folder):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)


def tables(model):
    return [model.params[name]["weight"] for name in ("embed_tokens", "lm_head") if name in model.params]


@pytest.mark.parametrize("method", ["mean", "interpolation"])
def test_rows_start_where_trained_ones_lie(folder, method):
    model, tokenizer = load(folder)
    used, old = len(tokenizer), tables(model)
    before = model.apply(model.params, None, TOKENS)
    pieces = tokenizer.encode(NEW[1], add_special_tokens=False)
    assert len(pieces) > 1
    add_new_tokens(model, tokenizer, NEW, method=method)

    assert tokenizer.convert_tokens_to_ids(NEW) == [used, used + 1]
    assert tokenizer.encode(f"a{NEW[0]}", add_special_tokens=False)[-1] == used
    assert model.causal_lm.config.vocab_size == max(models.VOCAB, used + 2)
    for was, now in zip(old, tables(model), strict=True):
        np.testing.assert_array_equal(now[:used], was[:used])
        trained = np.asarray(was[:used])
        expected = trained[trained.any(1)].mean(0)  # transformers leaves the pad token's row at zero
        if method == "interpolation":
            expected = 0.5 * expected + 0.5 * np.asarray(was)[pieces].mean(0)
        np.testing.assert_allclose(now[used + 1], expected, atol=1e-6)
    after = model.apply(model.params, None, TOKENS)
    np.testing.assert_allclose(after[..., :used], before[..., :used], rtol=1e-5, atol=1e-5)
    assert model.apply(model.params, None, jnp.array([[used, used + 1]])).shape[-1] == after.shape[-1]


def test_the_grown_model_is_trained_as_any(folder):
    model, tokenizer = load(folder)
    add_new_tokens(model, tokenizer, NEW, pad_to_multiple_of=64)
    assert model.causal_lm.config.vocab_size % 64 == 0
    adapted = FastLanguageModel.get_peft_model(model, r=4)
    tokens = jnp.array([[1, len(tokenizer) - 1, 5]])
    gradient = jax.grad(lambda lora: adapted.apply(adapted.params, lora, tokens)[..., -1].sum())(adapted.lora)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))
    with pytest.raises(AdapterError, match="before get_peft_model"):
        add_new_tokens(adapted, tokenizer, ["<more>"])


def test_rows_without_training_do_not_count(folder):
    model, tokenizer = load(folder)
    weight = model.params["embed_tokens"]["weight"].at[:100].set(0)
    model.params = {**model.params, "embed_tokens": {"weight": weight}}
    used = len(tokenizer)
    add_new_tokens(model, tokenizer, NEW)
    expected = np.asarray(weight[100:used]).mean(0)
    np.testing.assert_allclose(model.params["embed_tokens"]["weight"][used], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"new_tokens": ["<|end|>"]}, "'<|end|>', which the tokenizer has already"),
        ({"new_tokens": ["<a>", "<a>"]}, "a token twice"),
        ({"new_tokens": "<a>"}, "a list of strings"),
        ({"new_tokens": ["<a>"], "method": "meam"}, "Did you mean 'mean'"),
        ({"new_tokens": ["<a>"], "method": "interpolation", "interpolation": 2}, "from 0 to 1"),
        ({"new_tokens": ["<a>"], "interpolation": "a"}, "from 0 to 1"),
        ({"new_tokens": ["<a>"], "pad_to_multiple_of": "8"}, "pad_to_multiple_of='8'"),
        ({"new_tokens": ["<a>"], "pad_to_multiple_of": -8}, "pad_to_multiple_of=-8"),
        ({"new_tokens": 5}, "a list of strings"),
    ],
)
def test_what_cannot_be_added(folder, options, word):
    model, tokenizer = load(folder)
    size = len(tokenizer)
    with pytest.raises(OptionError) as caught:
        add_new_tokens(model, tokenizer, **options)
    assert word in str(caught.value)
    assert len(tokenizer) == size, "nothing half-done"


# ---- what is saved ----


@pytest.fixture(scope="module")
def grown(folder):
    """A model with new tokens and an adapter that is awake."""
    model, tokenizer = load(folder)
    add_new_tokens(model, tokenizer, NEW, method="interpolation", pad_to_multiple_of=256)
    model = FastLanguageModel.get_peft_model(model, r=4)
    noise = np.random.default_rng(0)
    model.lora = jax.tree.map(
        lambda x: x + 0.05 * noise.standard_normal(x.shape).astype("float32"), model.lora
    )
    return model


@pytest.fixture(scope="module")
def line(grown):
    return np.array([[5, len(grown.tokenizer) - 2, 9, len(grown.tokenizer) - 1, 7]])


def theirs(model, line):
    with torch.no_grad():
        return model(torch.from_numpy(line)).logits.numpy()


def test_the_merged_folder_has_them(grown, line, tmp_path):
    grown.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == len(merged.get_input_embeddings().weight)
    assert_close(grown.apply(grown.params, grown.lora, line), theirs(merged, line), 1e-5)
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(NEW)
    assert ids == grown.tokenizer.convert_tokens_to_ids(NEW)


def test_the_adapter_brings_them_along(grown, line, tmp_path):
    grown.save_pretrained(tmp_path / "adapter")
    again, tokenizer = load(tmp_path / "adapter")
    expected = grown.apply(grown.params, grown.lora, line)
    np.testing.assert_array_equal(again.apply(again.params, again.lora, line), expected)
    assert tokenizer.convert_tokens_to_ids(NEW) == grown.tokenizer.convert_tokens_to_ids(NEW)
    again.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(expected, theirs(merged, line), 1e-5)


def test_tables_that_are_trained_whole_have_them_too(folder, tmp_path):
    model, tokenizer = load(folder)
    add_new_tokens(model, tokenizer, NEW, pad_to_multiple_of=256)
    model = FastLanguageModel.get_peft_model(model, r=4, modules_to_save=["embed_tokens"])
    model.lora["embed_tokens"]["weight"] += 0.1
    model.save_pretrained(tmp_path / "adapter")
    again, _ = load(tmp_path / "adapter")
    assert_trees_equal(again.lora, model.lora)
    for name in model.own_parts:
        assert_trees_equal(again.params[name], model.params[name])


def test_peft_loads_the_adapter_onto_a_resized_base(grown, folder, line, tmp_path):
    grown.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(grown.causal_lm.config.vocab_size)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert_close(grown.apply(grown.params, grown.lora, line), theirs(adapted, line), 1e-5)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("whole", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_what_peft_saves_of_a_resized_model(folder, line, tmp_path, whole):
    """It writes both tables beside the adapter, or those in their place that were trained whole."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    base.resize_token_embeddings(448, mean_resizing=False)
    settings = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, settings)
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "modules_to_save" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    ours, _ = load(tmp_path / "adapter")
    assert ours.causal_lm.config.vocab_size == 448
    line = np.array([[5, 447, 440, 7]])
    assert_close(ours.apply(ours.params, ours.lora, line), theirs(adapted.eval(), line), 1e-5)


def test_tables_that_do_not_fit(grown, tmp_path):
    grown.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    embedding = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, embedding: tensors[embedding][:, :-1]}, path)
    with pytest.raises(AdapterError, match="embed_tokens has the shape"):
        load(tmp_path / "adapter")
    head = "base_model.model.lm_head.weight"
    save_file({**tensors, head: tensors[embedding] + 1}, path)
    if grown.causal_lm.config.tie_word_embeddings:
        with pytest.raises(AdapterError, match="a head that is not its embedding"):
            load(tmp_path / "adapter")
    else:
        del tensors[head]
        save_file(tensors, path)
        with pytest.raises(AdapterError, match="lacks the base model's lm_head"):
            load(tmp_path / "adapter")


def test_llama_cpp_reads_them(grown, line, tmp_path):
    (file,) = grown.save_pretrained_gguf(tmp_path / "model", quantization_method="f32")
    ours = np.asarray(grown.apply(grown.params, grown.lora, line))[0, -1]
    printable = models.tokenizer().convert_tokens_to_ids("b")
    theirs = LlamaCpp(file).next_logits(line[0].tolist(), len(ours), printable)
    assert_close(ours - ours.mean(), theirs - theirs.mean(), 1e-4)
