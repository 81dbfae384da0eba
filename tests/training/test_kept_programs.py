"""What one run has compiled, the next one finds in the compilation cache, whatever the state that it begins with."""

import functools

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxtune import LanguageModel, SFTConfig, SFTTrainer
from tests.kit import models, tiny

ROWS = [{"input_ids": np.random.default_rng(i).integers(0, 128, 20).tolist()} for i in range(4)]


@pytest.fixture
def programs(tmp_path):
    """Of a name, those that were compiled."""
    kept = {
        "jax_compilation_cache_dir": str(tmp_path / "cache"),
        "jax_persistent_cache_min_compile_time_secs": 0,
    }
    before = {name: getattr(jax.config, name) for name in kept}
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda name: sorted((tmp_path / "cache").glob(f"jit_{name}-*-cache"))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def fresh_model():
    causal_lm = tiny.model(windows=(None,), vocab_size=models.VOCAB)
    return LanguageModel(
        causal_lm, tiny.params(causal_lm), tiny.lora(causal_lm), models.tokenizer(), name_or_path="base"
    )


def train(model, folder, resume=None):
    settings = dict(max_steps=4, save_steps=2, lr_scheduler_type="constant", per_device_train_batch_size=2)
    config = SFTConfig(output_dir=folder, **settings)
    SFTTrainer(model, config, train_dataset=ROWS).train(resume_from_checkpoint=resume)


def test_a_run_has_one_program_fresh_resumed_and_of_a_trained_model(tmp_path, programs):
    model = fresh_model()
    train(model, tmp_path / "a")
    first = programs("step")
    assert len(first) == 1
    train(model, tmp_path / "b")
    train(fresh_model(), tmp_path / "a", resume=tmp_path / "a" / "checkpoint-2")
    assert programs("step") == first


def test_a_trained_model_generates_by_the_programs_it_had(tmp_path, programs):
    model = fresh_model()
    answer = functools.partial(model.generate, np.arange(1, 9)[None], max_new_tokens=2)
    answer()
    first = programs("_generate")
    assert first
    train(model, tmp_path / "a")
    answer()
    model.save_lora(tmp_path / "lora")
    answer(lora_request=model.load_lora(tmp_path / "lora"))
    assert programs("_generate") == first


def test_a_model_on_another_device_is_trained_there(tmp_path):
    model, there = fresh_model(), jax.devices()[1]
    model.params = jax.device_put(model.params, there)
    model.lora = jax.tree.map(np.asarray, model.lora)
    train(model, tmp_path / "a")
    assert all(x.devices() == {there} for x in jax.tree.leaves(model.lora))
