"""Steps of SFT against a plain torch loop: thirty of an adapter (PEFT's, with the same initial values), twelve of all
weights. The same data, AdamW by torch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, get_chat_template
from jaxtune.lora import peft_format
from jaxtune.models import names
from jaxtune.training.losses import next_token_loss, unwatched
from jaxtune.training.remat import remat
from jaxtune.training.step import value_and_grad
from tests.kit import families, models
from tests.kit.compare import assert_close
from tests.kit.twin import gradients, peft_twin

STEPS = 30
CONFIG = SFTConfig(
    max_steps=STEPS,
    learning_rate=5e-3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    weight_decay=0.01,
    optim="adamw_torch",
    assistant_only_loss=True,
)

FULL = dataclasses.replace(
    CONFIG, max_steps=12, learning_rate=1e-3, assistant_only_loss=False, weight_decay=0.1
)
TEXTS = [{"text": text} for text in ("the quick fox", "a lazy dog jumps over the fox", "over and over") * 3]


def dataset():
    rng = np.random.default_rng(0)
    words = ["fox", "dog", "quick", "lazy", "over", "jumps"]

    def say(n):
        return " ".join(rng.choice(words, n))

    return [
        {
            "messages": [
                {"role": "user", "content": say(rng.integers(1, 12))},
                {"role": "assistant", "content": say(rng.integers(1, 20))},
            ]
        }
        for _ in range(23)  # does not divide into steps: the last one of an epoch is smaller
    ]


@pytest.fixture(scope="module", params=["float32", "nf4"])
def trainer(request, tmp_path_factory):
    """One trainer, and the torch model that it must agree with; for NF4 that has our dequantised weights."""
    theirs = models.random_llama()
    folder = models.save(theirs, tmp_path_factory.mktemp("sft") / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(
        folder, dtype="float32", load_in_4bit=request.param == "nf4"
    )
    if request.param == "nf4":
        put_dequantized(theirs, model)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    tokenizer = get_chat_template(tokenizer, "chatml")
    return SFTTrainer(model, CONFIG, train_dataset=dataset(), tokenizer=tokenizer), peft_twin(theirs, model)


def put_dequantized(theirs, ours):
    weights = dict(theirs.named_parameters())
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours.causal_lm.skeleton):
        path = names.keys(path)
        stack = ours.params
        for key in path:
            stack = stack[key]
        if hasattr(stack, "dequantize"):
            assert stack.shape == leaf.shape
            for name, one in zip(
                names.hf_names(ours.causal_lm.config, path), stack.dequantize(), strict=True
            ):
                weights[name].data = torch.from_numpy(np.array(one))


def sequences(batch):
    """(tokens, labels) of every sample in a batch: taken out of its rows again, by segment."""
    for a, r in np.ndindex(batch["tokens"].shape[:2]):
        segments = batch["segment_ids"][a, r]
        for segment in range(1, segments.max() + 1):
            mine = segments == segment
            yield batch["tokens"][a, r][mine], batch["labels"][a, r][mine]


def torch_loss(twin, batch):
    """Every sample alone, summed, divided by the trained tokens of the step."""
    total, count = 0.0, 0
    for tokens, labels in sequences(batch):
        logits = twin(torch.from_numpy(tokens[None]).long()).logits[0]
        total = total + torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(labels).long(), ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    return total / count


def test_first_gradient_and_thirty_losses(trainer):
    trainer, twin = trainer
    model = trainer.model
    batches = [batch for _, (batch, _) in zip(range(STEPS), trainer.batches(), strict=False)]

    # B starts at zero, and so would A's gradient: compared where both are alive, after a nudge.
    nudged = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(1), x.shape), model.lora)
    loss = next_token_loss(model.causal_lm, remat("block"))
    value, grads, _ = jax.jit(lambda lora, params: value_and_grad(unwatched(loss), lora, params, batches[0]))(
        nudged, model.params
    )
    probe = peft_twin(twin.unload(), dataclasses.replace(model, lora=nudged))
    expected = torch_loss(probe, batches[0])
    expected.backward()
    assert_close(value, expected.detach().numpy(), 1e-5)
    ours = dict(peft_format.to_tensors(grads, model.causal_lm.lora_config, model.module_names))
    theirs = gradients(probe)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], 1e-4, name)

    expected = torch_run(peft_twin(probe.unload(), model), trainer.args, batches)
    trainer.train()
    compare([record["loss"] for record in trainer.log_history], expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "qwen2"])
def test_every_weight_after_a_run(family, tmp_path):
    """Full fine-tuning, of fused, tied, biased and windowed models; and what transformers loads of it."""
    theirs = families.random_model(family)
    folder = models.save(theirs, tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32", full_finetuning=True)
    trainer = SFTTrainer(model, FULL, train_dataset=TEXTS, tokenizer=tokenizer)
    batches = [batch for _, (batch, _) in zip(range(FULL.max_steps), trainer.batches(), strict=False)]
    before = {name: weight.detach().clone() for name, weight in theirs.named_parameters()}
    expected = torch_run(theirs.train(), FULL, batches)
    trainer.train()
    compare([record["loss"] for record in trainer.log_history], expected)

    model.save_pretrained(tmp_path / "trained")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trained", dtype="float32")
    for name, weight in loaded.named_parameters():
        moved = theirs.get_parameter(name) - before[name]
        assert_close((weight - before[name]).detach().numpy(), moved.detach().numpy(), 1e-2, name)


def torch_run(twin, args, batches):
    """The loss of each step; the twin is trained."""
    trained = {name: weight for name, weight in twin.named_parameters() if weight.requires_grad}
    decaying = Trainer.get_decay_parameter_names(None, twin)  # a rule of its own, which asks for no trainer
    groups = [
        {"params": [w for name, w in trained.items() if name in decaying], "weight_decay": args.weight_decay},
        {"params": [w for name, w in trained.items() if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    steps = args.max_steps
    warmup = args.warmup(steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: step / warmup if step < warmup else (steps - step) / (steps - warmup)
    )
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        step_loss = torch_loss(twin, batch)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), args.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(float(step_loss.detach()))
    return losses


def compare(ours, losses):
    assert losses[-1] < losses[0] - 1, "the run must learn something for the comparison to mean anything"
    np.testing.assert_allclose(ours, losses, rtol=0, atol=1e-3)
