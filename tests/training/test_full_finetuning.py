"""Full fine-tuning through the public names: what is kept and computed in, what a trainer leaves, what is refused.
That it is exact is shown in tests/parity/test_sft.py."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune import FastLanguageModel, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer, add_new_tokens
from jaxtune.errors import AdapterError, ConfigError, DivergenceError, OptionError
from tests.kit import models
from tests.kit.compare import assert_trees_equal, relative_rms

IDS = jnp.arange(5, 29)[None]
DATA = [{"text": "the quick fox jumps over the lazy dog"}] * 4
SHORT = dict(max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=1, warmup_steps=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(models.random_llama(), tmp_path_factory.mktemp("full") / "model")


def load(folder, **options):
    model, _ = FastLanguageModel.from_pretrained(folder, **{"full_finetuning": True, **options})
    return model


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def test_weights_in_bfloat16_move_by_steps_below_their_spacing(folder):
    model = load(folder, dtype="bfloat16")
    before = jax.tree.map(np.asarray, model.params)
    SFTTrainer(model, SFTConfig(**SHORT, learning_rate=1e-5), train_dataset=DATA).train()
    assert dtypes(model.params) == {"bfloat16"}
    was, now = (params["layers"][0][0]["mlp"]["up_proj"]["weight"] for params in (before, model.params))
    moved = np.mean(was != np.asarray(now))
    assert 0.01 < moved < 0.9, "some of the weights, by chance"


def test_float32_mixed_precision_computes_in_16_bits(folder):
    whole, mixed = (
        load(folder, dtype="bfloat16"),
        load(folder, dtype="bfloat16", float32_mixed_precision=True),
    )
    assert dtypes(mixed.params) == {"float32"}
    hidden, _ = mixed.causal_lm.hidden(mixed.params, None, IDS)
    assert hidden.dtype == jnp.bfloat16
    np.testing.assert_array_equal(whole.apply(whole.params, None, IDS), mixed.apply(mixed.params, None, IDS))
    assert (mixed.generate(IDS, max_new_tokens=4) == whole.generate(IDS, max_new_tokens=4)).all()
    SFTTrainer(mixed, SFTConfig(**SHORT), train_dataset=DATA).train()
    assert dtypes(mixed.params) == {"float32"}


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_grpo_trains_all_weights(folder, beta):
    """With beta, against the weights that it began with."""
    model = load(folder, dtype="float32")
    before = jax.tree.map(np.asarray, model.params)
    config = GRPOConfig(
        max_steps=2, num_generations=4, per_device_train_batch_size=4, gradient_accumulation_steps=1,
        max_completion_length=8, learning_rate=1e-3, beta=beta, logging_steps=1, warmup_steps=0,
    )  # fmt: skip
    reward = lambda completion_ids, **_: [float(ids[0] % 7) for ids in completion_ids]
    trainer = GRPOTrainer(model, reward, config, train_dataset=[{"prompt": "the quick fox"}])
    trainer.train()
    assert relative_rms(model.params["norm"]["weight"], before["norm"]["weight"]) > 1e-4
    kl = [record["kl"] for record in trainer.log_history] if beta else [0, 1]
    assert abs(kl[0]) < 1e-6 < kl[1], "the reference stays where the policy began"


def test_an_adapter_is_not_added(folder, capsys):
    model = load(folder)
    assert FastLanguageModel.get_peft_model(model, r=4) is model
    model.print_trainable_parameters()
    assert "trainable%: 100.0000" in capsys.readouterr().out
    assert "trained whole" in repr(model)


def test_a_run_that_diverges_says_that_the_weights_are_gone(folder):
    model = load(folder)
    model.params["norm"]["weight"] = model.params["norm"]["weight"].at[0].set(jnp.nan)
    with pytest.raises(DivergenceError, match="First load the model again"):
        SFTTrainer(model, SFTConfig(**SHORT), train_dataset=DATA).train()


def test_an_interrupted_run_leaves_the_newest_weights(folder):
    model = load(folder)
    before = jax.tree.map(np.asarray, model.params)

    def reward(completion_ids, trainer_state, **_):
        if trainer_state.global_step == 1:
            raise KeyboardInterrupt
        return [float(ids[0] % 7) for ids in completion_ids]

    config = GRPOConfig(
        max_steps=3, num_generations=4, per_device_train_batch_size=4, max_completion_length=4, warmup_steps=0
    )
    with pytest.raises(KeyboardInterrupt):
        GRPOTrainer(model, reward, config, train_dataset=[{"prompt": "the quick fox"}]).train()
    assert relative_rms(model.params["norm"]["weight"], before["norm"]["weight"]) > 0


def test_a_checkpoint_of_the_model_alone_is_a_model(folder, tmp_path):
    """Others are a state, and say so where they are taken for a model."""
    for name, more in (("alone", {"save_only_model": True}), ("state", {})):
        model = load(folder)
        SFTTrainer(model, SFTConfig(**SHORT, **more, output_dir=tmp_path / name), train_dataset=DATA).train()
        with pytest.raises(
            ConfigError, match=r"holds checkpoints of a run, and no model of its own"
        ) as caught:
            load(tmp_path / name)
        assert (f"Pass {str(tmp_path / name / 'checkpoint-2')!r}" in caught.value.fix) == bool(more)
        if more:
            again, _ = FastLanguageModel.from_pretrained(tmp_path / name / "checkpoint-2", load_in_16bit=True)
            assert_trees_equal(again.params, model.params)
    with pytest.raises(ConfigError, match=r"is a checkpoint of full fine-tuning: the state of a run"):
        load(tmp_path / "state" / "checkpoint-2")


def test_new_tokens_are_trained_and_saved(folder, tmp_path):
    model = load(folder)
    add_new_tokens(model, model.tokenizer, ["<think>"])
    SFTTrainer(model, SFTConfig(**SHORT), train_dataset=[{"text": "<think> the fox"}] * 4).train()
    model.save_pretrained(tmp_path / "saved")
    again, tokenizer = FastLanguageModel.from_pretrained(tmp_path / "saved", load_in_16bit=True)
    assert_trees_equal(again.params, model.params)
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"load_in_4bit": True}, "full_finetuning=True and load_in_4bit=True"),
        ({"load_in_8bit": True}, "one precision"),
        ({"quantization_config": {"load_in_4bit": True}}, "one precision"),
        ({"dtype": "float16"}, "small gradients"),
        ({"full_finetuning": False, "float32_mixed_precision": True}, "without full_finetuning=True"),
    ],
)
def test_what_does_not_go_together(folder, options, word):
    with pytest.raises(OptionError) as caught:
        load(folder, **options)
    assert word in str(caught.value)


def test_16_bits_may_be_said_twice(folder):
    assert dtypes(load(folder, load_in_16bit=True, load_in_4bit=False, dtype="bfloat16").params) == {
        "bfloat16"
    }


def test_quantised_weights_and_adapters_are_not_trained_whole(folder, tmp_path):
    adapted = FastLanguageModel.get_peft_model(load(folder, full_finetuning=False), r=4)
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(OptionError, match="is an adapter"):
        load(tmp_path / "adapter")
    quantised = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    copy = shutil.copytree(folder, tmp_path / "quantised")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(OptionError, match="holds quantised weights"):
        load(copy)
    with pytest.raises(AdapterError, match="trained whole"):
        load(folder).save_pretrained_merged(tmp_path / "lora", save_method="lora")
