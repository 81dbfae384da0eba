"""An embedding in the host's memory: the same numbers everywhere, and nothing of it on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, add_new_tokens
from jaxtune.device_memory import Memory, is_on_host
from jaxtune.errors import OptionError
from jaxtune.loading.offloading import offloads_embedding
from tests.kit import models, tiny
from tests.kit.compare import assert_trees_equal

BF16 = jnp.dtype("bfloat16")
SAMPLES = [{"input_ids": list(range(first, first + 20))} for first in range(16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(
        models.random_llama(tie_word_embeddings=False), tmp_path_factory.mktemp("off") / "model"
    )


def load(folder, offload, **options):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", offload_embedding=offload, **options)


def offloaded(model):
    return {name for name in model.params if any(map(is_on_host, jax.tree.leaves(model.params[name])))}


def train(model, **options):
    model = FastLanguageModel.get_peft_model(model, r=4, **options)
    trainer = SFTTrainer(
        model,
        SFTConfig(max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2),
        train_dataset=SAMPLES,
    )
    trainer.train()
    assert offloaded(model) == offloaded(trainer.model)
    return model, [entry["loss"] for entry in trainer.log_history]


def test_only_the_embedding_waits_there(folder):
    model, _ = load(folder, True)
    assert offloaded(model) == {"embed_tokens"}
    assert offloaded(load(folder, False)[0]) == set()
    assert offloaded(load(folder, "auto")[0]) == set(), "a CPU does not say what memory it has"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_gradient_checkpointing": "offload"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": r".*(q_proj|embed_tokens)"},
    ],
    ids=["frozen", "offload", "trained whole", "adapted"],
)
def test_it_is_trained_with_as_any(folder, options):
    (here, losses), (there, others) = (
        train(load(folder, offload)[0], **options) for offload in (False, True)
    )
    np.testing.assert_allclose(losses, others, rtol=1e-6)
    assert losses[-1] < losses[0]
    for ours, theirs in zip(jax.tree.leaves(here.lora), jax.tree.leaves(there.lora), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_it_is_generated_with_as_any(folder):
    prompts = [[5, 6, 7, 8]]
    ours, theirs = (load(folder, offload)[0].generate(prompts, max_new_tokens=8) for offload in (True, False))
    np.testing.assert_array_equal(ours, theirs)


def test_new_tokens_join_it_and_it_is_saved_with_them(folder, tmp_path):
    grown = []
    for offload in (True, False):
        model, tokenizer = load(folder, offload)
        add_new_tokens(model, tokenizer, ["<think>"])
        model = FastLanguageModel.get_peft_model(model, r=4)
        model.save_pretrained(tmp_path / str(offload), tokenizer)
        grown.append(model)
    assert offloaded(grown[0]) == {"embed_tokens"}
    assert_trees_equal(jax.device_get(grown[0].params), jax.device_get(grown[1].params))
    again, _ = load(tmp_path / "True", True)
    assert offloaded(again) == {"embed_tokens"}
    assert_trees_equal(jax.device_get(again.params), jax.device_get(grown[1].params))


def test_auto_offloads_what_would_be_a_twentieth_of_the_device():
    model = tiny.model(vocab_size=10_000, hidden_size=1000)  # 20 MB in 16 bits
    of = lambda limit, model=model, full=False: offloads_embedding(
        "auto", model, BF16, full, Memory(0, limit)
    )
    assert of(400_000_000) and not of(400_000_001)
    assert not of(1, model=tiny.model(tie_word_embeddings=True)), "the head needs it"
    assert not of(1, full=True), "it is trained"


def test_a_tied_one_stays_and_says_so(tmp_path, caplog):
    folder = models.save(models.random_llama(tie_word_embeddings=True), tmp_path / "tied")
    model, _ = load(folder, True)
    assert offloaded(model) == set()
    assert "head is its embedding" in caplog.text


def test_what_is_trained_cannot_wait_there(folder):
    with pytest.raises(OptionError, match="offload_embedding=True with full_finetuning=True"):
        load(folder, True, full_finetuning=True)


def test_a_typo_is_noticed(folder):
    with pytest.raises(OptionError, match="offload_embedding='always'"):
        load(folder, "always")
