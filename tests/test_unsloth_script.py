"""A script as Unsloth's users have it, with nothing changed but where its names come from."""

import json

import numpy as np
import pytest

from jaxtune import (
    SFTConfig,
    SFTTrainer,
    UnslothTrainer,
    UnslothTrainingArguments,
    is_bfloat16_supported,
    unsloth_names,
)
from jaxtune.errors import OptionError
from tests.kit import models

SCRIPT = """
import torch
from jaxtune import FastLanguageModel, is_bfloat16_supported, unsloth_train
from jaxtune.chat_templates import get_chat_template, standardize_sharegpt, train_on_responses_only
from datasets import load_dataset
from jaxtune import SFTConfig, SFTTrainer
from transformers import DataCollatorForSeq2Seq

max_seq_length = 128
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name = MODEL,
    max_seq_length = max_seq_length,
    dtype = None,
    load_in_4bit = True,
)
model = FastLanguageModel.get_peft_model(
    model,
    r = 16,
    target_modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",],
    lora_alpha = 16,
    lora_dropout = 0,
    bias = "none",
    use_gradient_checkpointing = "unsloth",
    random_state = 3407,
    use_rslora = False,
    loftq_config = None,
)
tokenizer = get_chat_template(
    tokenizer,
    chat_template = "chatml",
)

def formatting_prompts_func(examples):
    convos = examples["conversations"]
    texts = [tokenizer.apply_chat_template(convo, tokenize = False, add_generation_prompt = False) for convo in convos]
    return { "text" : texts, }

dataset = load_dataset("json", data_files = DATA, split = "train")
dataset = standardize_sharegpt(dataset)
dataset = dataset.map(formatting_prompts_func, batched = True,)

trainer = SFTTrainer(
    model = model,
    tokenizer = tokenizer,
    train_dataset = dataset,
    dataset_text_field = "text",
    max_seq_length = max_seq_length,
    data_collator = DataCollatorForSeq2Seq(tokenizer = tokenizer),
    dataset_num_proc = 2,
    packing = False,
    args = SFTConfig(
        per_device_train_batch_size = 2,
        gradient_accumulation_steps = 4,
        warmup_steps = 1,
        max_steps = 4,
        learning_rate = 2e-3,
        fp16 = not is_bfloat16_supported(),
        bf16 = is_bfloat16_supported(),
        logging_steps = 1,
        optim = "adamw_8bit",
        weight_decay = 0.01,
        lr_scheduler_type = "linear",
        seed = 3407,
        output_dir = OUTPUTS,
        report_to = "none",
    ),
)
trainer = train_on_responses_only(
    trainer,
    instruction_part = "<|im_start|>user\\n",
    response_part = "<|im_start|>assistant\\n",
)
trainer_stats = unsloth_train(trainer)

FastLanguageModel.for_inference(model)
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": "the quick fox"}], tokenize = True, add_generation_prompt = True,
    return_tensors = "pt", return_dict = False,
)
outputs = model.generate(input_ids = inputs, max_new_tokens = 4, use_cache = True)
model.save_pretrained("lora_model")
tokenizer.save_pretrained("lora_model")
model.save_pretrained_merged("model", tokenizer, save_method = "merged_16bit",)
"""


def test_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = models.save(models.random_llama(), tmp_path / "base")
    words = ["fox", "dog", "quick", "lazy", "over", "jumps"]
    rng = np.random.default_rng(0)
    say = lambda: " ".join(rng.choice(words, 5))
    turns = [[("human", say()), ("gpt", say()), ("human", say()), ("gpt", say())] for _ in range(16)]
    rows = [{"conversations": [{"from": who, "value": what} for who, what in turn]} for turn in turns]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"MODEL": str(base), "DATA": str(tmp_path / "data.jsonl"), "OUTPUTS": str(tmp_path / "outputs")}
    exec(compile(SCRIPT, "script.py", "exec"), names)
    losses = [record["loss"] for record in names["trainer"].log_history]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert names["trainer_stats"].global_step == 4
    assert names["outputs"].shape[1] > names["inputs"].shape[1]
    assert (tmp_path / "lora_model" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "model" / "config.json").is_file()


def test_names_that_are_something_else_here(monkeypatch):
    assert UnslothTrainer is SFTTrainer and UnslothTrainingArguments is SFTConfig
    for found, supported in ((0.0, True), (7.5, False), (8.0, True), (9.0, True)):
        monkeypatch.setattr(unsloth_names, "capability", lambda found=found: found)
        assert is_bfloat16_supported() is supported


def test_a_collator_that_would_do_something_is_refused():
    class Masks:
        pass

    with pytest.raises(OptionError, match="data_collator=Masks"):
        SFTTrainer(None, data_collator=Masks())
