"""What one run has compiled, the next one finds in the compilation cache, whatever the state that it begins with."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxtune import LanguageModel, SFTConfig, SFTTrainer
from tests.kit import models, tiny

ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 128, 20).tolist()} for i in range(4)]


@pytest.fixture
def programs_of_steps(tmp_path):
    kept = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda: sorted((tmp_path / "cache").glob("jit_step-*-cache"))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def train(model, folder, resume=None):
    settings = dict(max_steps=4, save_steps=2, lr_scheduler_type="constant", per_device_train_batch_size=2)
    config = SFTConfig(output_dir=folder, **settings)
    SFTTrainer(model, config, train_dataset=ROWS).train(resume_from_checkpoint=resume)


def test_a_run_has_one_program_fresh_resumed_and_of_a_trained_model(tmp_path, programs_of_steps):
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    fresh = LanguageModel(causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer())
    model = dataclasses.replace(fresh)
    train(model, tmp_path / "a")
    first = programs_of_steps()
    assert len(first) == 1
    train(model, tmp_path / "b")
    train(dataclasses.replace(fresh), tmp_path / "a", resume=tmp_path / "a" / "checkpoint-2")
    assert programs_of_steps() == first
