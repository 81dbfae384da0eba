"""What training and saving make of the families that are unlike Llama: the adapter's gradients are PEFT's, caps and
multipliers of the logits included, and the merged folder is the adapted model in transformers."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune import FastLanguageModel
from jaxtune.api import FUSED_PROJECTIONS
from jaxtune.lora import peft_format
from jaxtune.lora.config import PROJECTIONS
from jaxtune.training.losses import next_token_loss
from tests.kit import families, models, twin
from tests.kit.compare import assert_close, relative_rms

LENGTHS = (30, 18)


@pytest.fixture(scope="module", params=["llama", "gemma2", "gemma3_text", "phi3, window", "granite"])
def adapted(request, tmp_path_factory):
    """A model with an adapter that is awake, by its default targets; its folder, and transformers' base model."""
    theirs = families.random_model(request.param)
    folder = models.save(theirs, tmp_path_factory.mktemp("families") / "base")
    model, _ = FastLanguageModel.from_pretrained(
        folder, dtype="float32", load_in_4bit=False, max_seq_length=64
    )
    model = FastLanguageModel.get_peft_model(model, r=4)
    lora = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), model.lora)
    return dataclasses.replace(model, lora=lora), theirs


@pytest.fixture(scope="module")
def batch():
    """Two sequences in one row."""
    tokens = np.random.default_rng(0).integers(5, models.VOCAB, (1, sum(LENGTHS))).astype(np.int32)
    segments = np.repeat([1, 2], LENGTHS)[None].astype(np.int32)
    labels = np.where(np.roll(segments, -1) == segments, np.roll(tokens, -1), -100).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in LENGTHS])[None].astype(np.int32)
    return {"tokens": tokens, "labels": labels, "segment_ids": segments, "positions": positions}


def test_every_projection_is_a_target_by_default(adapted):
    """The seven names mean all linears, also where they are fused."""
    model, _ = adapted
    fused = model.causal_lm.config.fused_projections
    found = {str(path[-2].key) for path, _ in jax.tree_util.tree_leaves_with_path(model.lora)}
    assert found == set(FUSED_PROJECTIONS if fused else PROJECTIONS)


def test_the_merged_folder_is_the_adapted_model(adapted, batch, tmp_path):
    model, theirs = adapted
    model.save_pretrained_merged(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    ids = batch["tokens"][:, : LENGTHS[0]]
    with torch.no_grad():
        base, expected = (m(torch.from_numpy(ids).long()).logits.numpy() for m in (theirs, merged))
    assert relative_rms(expected, base) > 1e-2, "the adapter must matter"
    assert_close(model.apply(model.params, model.lora, ids), expected, 1e-5)


def test_gradients_are_pefts(adapted, batch):
    """Last, because PEFT changes the torch model."""
    model, theirs = adapted
    loss = next_token_loss(model.causal_lm)
    value, grads = jax.jit(jax.value_and_grad(loss))(model.lora, model.params, batch)
    probe = twin.peft_twin(theirs, model)
    total = 0.0
    for segment in (1, 2):
        mine = batch["segment_ids"] == segment
        tokens, labels = (torch.from_numpy(batch[name][mine]).long() for name in ("tokens", "labels"))
        logits = probe(tokens[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    total.backward()
    assert_close(value, total.detach().numpy(), 1e-5)
    ours = dict(peft_format.to_tensors(grads, model.causal_lm.lora_config, model.module_names))
    expected = twin.gradients(probe)
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        assert_close(gradient, expected[name], 1e-4, name)
