"""A small run for a process of its own, which others kill: it begins in a folder, or goes on from its newest
checkpoint."""

from pathlib import Path

import numpy as np

from jaxtune import LanguageModel, SFTConfig, SFTTrainer
from jaxtune.training.checkpoints import saved
from tests.kit import models, tiny

STEPS = 240
ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 128, 20).tolist()} for i in range(8)]


def run(folder: Path) -> None:
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    model = LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer())
    config = SFTConfig(
        output_dir=folder, max_steps=STEPS, save_steps=3, save_total_limit=3, logging_steps=4,
        per_device_train_batch_size=2, learning_rate=1e-3,
    )  # fmt: skip
    trainer = SFTTrainer(model, config, train_dataset=ROWS)
    trainer.train(resume_from_checkpoint=bool(saved(folder)))
