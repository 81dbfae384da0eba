"""Fifty steps of SFT under TRL's own trainer, with PEFT: the same loss and gradient norm at every step."""

import dataclasses
import warnings

import datasets
import numpy as np
import pytest
import torch
import trl
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer
from tests.kit import families, models
from tests.kit.twin import peft_twin

STEPS = 50
CONFIG = SFTConfig(
    max_steps=STEPS,
    learning_rate=2e-3,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    weight_decay=0.01,
    optim="adamw_torch",
)
ROWS = [{"input_ids": np.random.default_rng(i).integers(1, 96, 5 + 3 * (i % 9)).tolist()} for i in range(24)]


class InOrder(trl.SFTTrainer):
    """Takes the samples as they come: in the order of our run."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def under_trl(twin, rows, tokenizer, folder, steps=STEPS, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, about names that change
        config = trl.SFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=CONFIG.learning_rate, optim=CONFIG.optim,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, weight_decay=CONFIG.weight_decay,
            warmup_steps=CONFIG.warmup(steps), lr_scheduler_type="linear", max_grad_norm=1.0, logging_steps=1,
            report_to="none", save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
            disable_tqdm=True, **settings,
        )  # fmt: skip
        dataset = datasets.Dataset.from_list(rows)
        initial = {name: weight.data for name, weight in twin.named_parameters() if weight.requires_grad}
        trainer = InOrder(model=twin, args=config, train_dataset=dataset, processing_class=tokenizer)
        for name, value in initial.items():  # TRL has made them bfloat16, if the base is quantised
            twin.get_parameter(name).data = value
        trainer.train()
    return [record for record in trainer.state.log_history if "grad_norm" in record]


def under_ours(model):
    """The log, and the samples of the run as they came."""
    trainer = SFTTrainer(model, CONFIG, train_dataset=ROWS)
    ids = [info.sample_ids for _, (_, info) in zip(range(STEPS), trainer.batches(), strict=False)]
    trainer.train()
    return trainer.log_history, ids


def compare(ours, theirs, tolerance, steps=STEPS):
    for name in ("loss", "grad_norm"):
        mine, expected = (np.array([record[name] for record in log]) for log in (ours, theirs))
        assert len(mine) == len(expected) == steps
        np.testing.assert_allclose(mine, expected, rtol=tolerance, atol=tolerance, err_msg=name)
    for name in ("step", "num_tokens"):
        assert [record[name] for record in ours] == [record[name] for record in theirs], name
    assert steps < STEPS or ours[-1]["loss"] < 0.97 * ours[0]["loss"], "it learns"


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_float32(family, tmp_path):
    theirs = families.random_model(family)
    folder = models.save(theirs, tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    twin = peft_twin(theirs, model)
    log, ids = under_ours(model)
    compare(log, under_trl(twin, [ROWS[i] for step in ids for i in step], tokenizer, tmp_path / "trl"), 1e-3)


def test_packed(tmp_path):
    """Samples longer than a row are cut: there, too, the parts do not see one another."""
    packing = dict(packing=True, packing_strategy="bfd_split", max_length=24)
    theirs = models.random_llama()
    folder = models.save(theirs, tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32", load_in_16bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    twin = peft_twin(theirs, model)
    config = dataclasses.replace(CONFIG, max_steps=6, train_sampling_strategy="sequential", **packing)
    trainer = SFTTrainer(model, config, train_dataset=ROWS)
    trainer.train()
    compare(trainer.log_history, under_trl(twin, ROWS, tokenizer, tmp_path / "trl", 6, **packing), 1e-3, 6)


def test_in_nf4(tmp_path):
    """Against bitsandbytes' own packing and arithmetic."""
    # Widths of whole blocks: elsewhere bitsandbytes' blocks run on into the next row, and ours end with theirs.
    folder = models.save(models.random_llama(intermediate_size=128), tmp_path / "base")
    model, tokenizer = FastLanguageModel.from_pretrained(folder, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=16)
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=packed)
    twin = peft_twin(theirs, model)
    log, ids = under_ours(model)
    compare(log, under_trl(twin, [ROWS[i] for step in ids for i in step], tokenizer, tmp_path / "trl"), 1e-2)
