"""What people do wrong, through the names that they use: one typed error each, which says what was found, what was
expected and what to do, and nothing half-written left behind."""

import json
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune.errors as errors
from jaxtune import FastLanguageModel, SFTConfig, SFTTrainer, get_chat_template
from tests.kit import models
from tests.kit.disk import files_of_at_most


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of several shards."""
    folder = models.save(
        models.random_llama(), tmp_path_factory.mktemp("good") / "model", max_shard_size="200KB"
    )
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """A copy to break."""
    return shutil.copytree(good, tmp_path / "model")


@pytest.fixture(scope="module")
def model(good):
    return FastLanguageModel.from_pretrained(good, dtype="float32")[0]


@pytest.fixture(scope="module")
def adapted(model):
    return FastLanguageModel.get_peft_model(model, r=4)


def fails(kind, *words):
    """Raises `kind`, and the message has all three parts and these words."""

    class Check:
        def __enter__(self):
            self.raises = pytest.raises(kind)
            self.info = self.raises.__enter__()

        def __exit__(self, *exc):
            swallowed = self.raises.__exit__(*exc)
            message = str(self.info.value)
            for word in ("expected:", "what to do:", *words):
                assert word in message, f"{word!r} is not in {message!r}"
            return swallowed

    return Check()


def load(folder, **options):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", **options)


def shard_of(folder, tensor):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def rewrite(folder, tensor, change):
    path = shard_of(folder, tensor)
    tensors = {name: np.array(a) for name, a in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


NORM = "model.norm.weight"
UP = "model.layers.1.mlp.up_proj.weight"


# ---- loading ----


def test_a_missing_folder(tmp_path):
    with fails(errors.ModelNotFoundError, "nowhere"):
        load(tmp_path / "nowhere")


def test_a_hub_id_when_offline():
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with fails(errors.ModelNotFoundError, "somebody/some-model", "HF_HUB_OFFLINE"):
        load("somebody/some-model")


def test_an_unknown_model_type(broken):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "llamma"}))
    with fails(errors.UnsupportedModelError, "'llamma'", "Did you mean 'llama'?"):
        load(broken)


def test_a_missing_shard(broken):
    shard_of(broken, UP).unlink()
    with fails(errors.CheckpointError, "missing"):
        load(broken)


def test_a_truncated_shard(broken):
    path = shard_of(broken, UP)
    path.write_bytes(path.read_bytes()[:-100])
    with fails(errors.CheckpointError, "truncated", path.name):
        load(broken)


def test_an_index_naming_a_tensor_that_is_not_there(broken):
    rewrite(broken, NORM, lambda tensors: tensors.pop(NORM))
    with fails(errors.CheckpointError, NORM):
        load(broken)


def test_a_weight_that_the_architecture_needs_and_nobody_has(broken):
    rewrite(broken, UP, lambda tensors: tensors.pop(UP))
    path = broken / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][UP]
    path.write_text(json.dumps(index))
    with fails(errors.CheckpointError, "lacks 1 of", UP):
        load(broken)


def test_a_shape_that_contradicts_the_config(broken):
    rewrite(broken, UP, lambda tensors: tensors.update({UP: tensors[UP][:-1]}))
    with fails(errors.CheckpointError, UP, "(255, 128)", "(256, 128)"):
        load(broken)


@pytest.mark.parametrize("name", [NORM, UP], ids=["16-bit", "packed"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite(broken, name, value):
    def spoil(tensors):
        tensors[name].reshape(-1)[5] = value

    rewrite(broken, name, spoil)
    with fails(errors.CheckpointError, name, "NaN or infinite"):
        load(broken)


def test_a_pickle_checkpoint(broken):
    for path in broken.glob("model*.safetensors*"):
        path.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with fails(errors.CheckpointError, "pickle", "run code"):
        load(broken)


def test_a_checkpoint_that_is_quantised_in_an_unknown_way(broken):
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (broken / "config.json").write_text(json.dumps(config))
    with fails(errors.UnsupportedModelError, "gptq"):
        load(broken)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_key_value_heads": 3}, "3 key/value heads"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, "'proportional'"),
    ],
    ids=["heads", "activation", "rope"],
)
def test_a_config_that_we_cannot_follow(broken, change, word):
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, **change}))
    with fails(errors.ConfigError, word):
        load(broken)


def test_two_precisions(good):
    with fails(errors.OptionError, "load_in_16bit"):
        load(good, load_in_4bit=True, load_in_16bit=True)


def test_a_dtype_that_is_none(good):
    with fails(errors.OptionError, "int8"):
        FastLanguageModel.from_pretrained(good, dtype="int8")


def test_a_mistyped_option(good):
    with fails(errors.OptionError, "max_seq_lenght", "Did you mean 'max_seq_length'"):
        load(good, max_seq_lenght=128)


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, null]}'])
def test_generation_settings_that_cannot_be_read(broken, content):
    (broken / "generation_config.json").write_text(content)
    with fails(errors.ConfigError, str(broken)):
        load(broken)


@pytest.mark.parametrize("length", ["2048", 2048.0, True, 0, 1])
def test_a_length_that_is_none(good, length):
    with fails(errors.OptionError, "max_seq_length="):
        load(good, max_seq_length=length)


def test_other_libraries_names(good):
    """What scripts pass by habit; our own models need no code of theirs."""
    model, _ = FastLanguageModel.from_pretrained(
        good, torch_dtype="float16", trust_remote_code=True, attn_implementation="flash_attention_2",
        gpu_memory_utilization=0.6, max_lora_rank=32,
    )  # fmt: skip
    assert model.params["norm"]["weight"].dtype == "float16"
    model, _ = FastLanguageModel.from_pretrained(good, dtype="auto")
    assert model.params["norm"]["weight"].dtype == "float32"


def test_an_option_that_is_not_here_yet(good):
    with fails(errors.OptionError, "fast_inference=True"):
        load(good, fast_inference=True)


# ---- adapters ----


@pytest.mark.parametrize("r", [0, -4, 2.5, True])
def test_a_rank_that_is_none(model, r):
    with fails(errors.AdapterError, f"r={r!r}"):
        FastLanguageModel.get_peft_model(model, r=r)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", [1]),
        ("exclude_modules", 5),
        ("modules_to_save", [None]),
        ("rank_pattern", 5),
        ("alpha_pattern", {1: 2}),
        ("lora_dropout", "much"),
        ("lora_dropout", None),
        ("loftq_config", 3),
        ("finetune_last_n_layers", 1.5),
    ],
)
def test_a_setting_of_another_kind(model, name, value):
    with fails((errors.AdapterError, errors.OptionError), name):
        FastLanguageModel.get_peft_model(model, **{name: value})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": "no"}, ["use_dora='no'", "True or False"]),
        ({"random_state": 1.5}, ["random_state=1.5"]),
        ({"exclude_modules": ["qq_proj"]}, ["exclude_modules has 'qq_proj'", "q_proj"]),
        ({"target_modules": ["embed_tokens"]}, ["names no linear", "trained whole"]),
        ({"exclude_modules": ".*"}, ["q_proj"]),
    ],
)
def test_settings_that_leave_nothing_or_say_nothing(model, settings, words):
    with fails((errors.AdapterError, errors.OptionError), *words):
        FastLanguageModel.get_peft_model(model, **settings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_8bit": "false"}, ["load_in_8bit='false'"]),
        ({"full_finetuning": "yes"}, ["full_finetuning='yes'"]),
        ({"quantization_config": "nf4"}, ["quantization_config='nf4'", "load_in_fp8"]),
        (
            {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quanttype": "nf4"}},
            ["Did you mean 'bnb_4bit_quant_type'"],
        ),
        (
            {"quantization_config": {"load_in_4bit": True}, "load_in_4bit": False},
            ["load_in_4bit=False", "one precision"],
        ),
    ],
)
def test_a_precision_that_is_mistyped(good, options, words):
    with fails(errors.OptionError, *words):
        load(good, **options)


def test_a_tokenizer_that_is_too_large_for_the_model(adapted, tmp_path):
    """It is neither trained with nor saved."""
    large = models.fresh_tokenizer()
    large.add_tokens([f"<b{i}>" for i in range(100)])
    with fails(errors.ConfigError, "The tokenizer that was given has", "add_new_tokens"):
        SFTTrainer(adapted, SFTConfig(max_steps=1), train_dataset=[{"text": "<b99> hi"}], tokenizer=large)
    for save in (adapted.save_pretrained, adapted.save_pretrained_merged):
        with fails(errors.ConfigError, "The tokenizer that was given has"):
            save(tmp_path / "out", large)
        with fails(errors.OptionError, "'tok'"):
            save(tmp_path / "out", "tok")
        with fails(errors.OutputFolderError, "None"):
            save(None)
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_its_bases_folder(broken):
    model = FastLanguageModel.get_peft_model(load(broken)[0], r=4)
    with fails(errors.OutputFolderError, "holds a model"):
        model.save_pretrained(broken)


def test_settings_that_may_be_left_open(model):
    open_ones = FastLanguageModel.get_peft_model(
        model, target_modules=None, random_state=None, modules_to_save="lm_head"
    )
    said = FastLanguageModel.get_peft_model(model, modules_to_save=["lm_head"])
    assert open_ones.causal_lm == said.causal_lm


@pytest.mark.parametrize(
    "targets", [["query_proj"], "query_proj", []], ids=["a list", "a regex", "none at all"]
)
def test_targets_that_match_nothing(model, targets):
    with fails(errors.AdapterError, "".join(targets), "q_proj"):
        FastLanguageModel.get_peft_model(model, target_modules=targets)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lora_dropout": 1.0}, ["lora_dropout=1.0"]),
        ({"lora_alpha": "16"}, ["lora_alpha='16'"]),
        ({"bias": "some"}, ["bias='some'", "'lora_only'"]),
        ({"modules_to_save": ["norm"]}, ["modules_to_save='norm'", "'embed_tokens'"]),
        ({"init_lora_weights": "gausian"}, ["init_lora_weights='gausian'", "'gaussian'"]),
        ({"layers_to_transform": [7]}, ["layers_to_transform has layer 7"]),
        ({"layers_to_transform": [0], "target_modules": "q_proj"}, ["layers_to_transform=[0]", "'q_proj'"]),
        ({"layers_pattern": "layers"}, ["without layers_to_transform"]),
        ({"layers_to_transform": [1], "layers_pattern": "blocks"}, ["matches no linear"]),
        ({"finetune_last_n_layers": 0}, ["finetune_last_n_layers=0", "2 layers"]),
        ({"rank_pattern": {"q_proj": 0}}, ["rank_pattern['q_proj']=0"]),
        ({"rank_pattern": {"q_porj": 4}}, ["'q_porj'", "Did you mean 'q_proj'"]),
        ({"alpha_pattern": {"(up_proj": 4}}, ["'(up_proj'", "regular expression"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'", "packed"]),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, ["alpha of 0"]),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 5}}, ["5 iterations"]),
        ({"use_dora": True, "target_modules": ".*(q_proj|lm_head)"}, ["use_dora=True", "has lm_head"]),
        ({"init_lora_weights": "loftq", "target_modules": ".*tokens"}, ["'loftq'", "has embed_tokens"]),
    ],
)
def test_adapter_settings_that_cannot_be(model, settings, words):
    with fails(errors.JaxtuneError, *words):
        FastLanguageModel.get_peft_model(model, **settings)


def test_one_target_among_others_that_matches_nothing(model):
    with fails(errors.AdapterError, "'v_porj'", "Did you mean 'v_proj'"):
        FastLanguageModel.get_peft_model(model, target_modules=["q_proj", "v_porj"])


def test_a_second_adapter_does_not_replace_the_first(adapted):
    assert FastLanguageModel.get_peft_model(adapted, r=4) is adapted
    with fails(errors.AdapterError, "an adapter already"):
        FastLanguageModel.get_peft_model(adapted, r=8)


def test_what_from_pretrained_returned_passed_on_whole(model):
    with fails(errors.OptionError, "tuple"):
        FastLanguageModel.get_peft_model((model, None))


def test_a_level_of_checkpointing_that_is_none(model):
    with fails(errors.OptionError, "'block'"):
        FastLanguageModel.get_peft_model(model, use_gradient_checkpointing="blok")


def test_a_regex_that_is_none(model):
    with fails(errors.AdapterError, "regular expression"):
        FastLanguageModel.get_peft_model(model, target_modules="(q_proj")


def test_saving_without_an_adapter_in_a_precision_that_nobody_reads(good, tmp_path):
    with fails(errors.UnsupportedModelError, "float8", "load_in_4bit"):
        load(good, load_in_fp8=True)[0].save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter_folder(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_adapter_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_adapter_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = {name: np.array(a) for name, a in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: edit_adapter_config(f, r=8), ["(4, 256)", "(8, 256)"]),
        (lambda f: edit_adapter_config(f, use_dora=True), ["no tensor", "lora_magnitude_vector"]),
        (lambda f: edit_adapter_config(f, modules_to_save=["lm_head"]), ["no tensor", "lm_head.weight"]),
        (lambda f: edit_adapter_config(f, modules_to_save=["score"]), ["modules_to_save='score'"]),
        (lambda f: edit_adapter_config(f, trainable_token_indices=[1]), ["trainable_token_indices=[1]"]),
        (
            lambda f: edit_adapter_config(f, target_modules=["q_proj", "embed_tokens"]),
            ["no tensor", "model.embed_tokens.lora_embedding_"],
        ),
        (
            lambda f: edit_adapter_config(f, target_modules=["q_proj", "lm_head"], use_dora=True),
            ["use_dora=True", "lm_head"],
        ),
        (
            lambda f: edit_adapter_config(
                f, target_modules=".*(embed_tokens|v_proj)", init_lora_weights="pissa"
            ),
            ["'pissa'", "embed_tokens"],
        ),
        (lambda f: edit_adapter_config(f, peft_type="IA3"), ["'IA3'"]),
        (lambda f: edit_adapter_config(f, rank_pattern=["q_proj"]), []),
        (lambda f: edit_adapter_config(f, lora_dropout="0.1"), []),
        (lambda f: edit_adapter_config(f, target_modules=["q_proj"]), ["belong to no targeted module"]),
        (lambda f: edit_adapter_weights(f, lambda t: t.pop(A)), [A, "no tensor"]),
        (lambda f: edit_adapter_weights(f, lambda t: t.update({"x." + A: t.pop(A)})), [A]),
        (lambda f: edit_adapter_weights(f, lambda t: t[A].fill(np.nan)), ["NaN"]),
        (lambda f: (f / "adapter_config.json").write_text("{"), ["not JSON"]),
        (lambda f: edit_adapter_config(f, init_lora_weights="pissa"), ["'pissa'", "packed"]),
        (lambda f: edit_adapter_config(f, init_lora_weights="pissa_niter_4"), ["'pissa_niter_4'"]),
        (lambda f: edit_adapter_config(f, init_lora_weights="loftq"), ["'loftq'"]),
    ],
    ids=[
        "rank",
        "dora",
        "a whole head",
        "a whole module that is unknown",
        "single tokens",
        "a low-rank embedding",
        "dora on the head",
        "pissa on the embedding",
        "another method",
        "ranks that are no map",
        "dropout that is no number",
        "fewer targets",
        "a factor missing",
        "wrong prefix",
        "nan",
        "bad json",
        "pissa",
        "pissa by a sketch",
        "loftq",
    ],
)
def test_an_adapter_that_does_not_fit(adapter_folder, change, words):
    change(adapter_folder)
    with fails(errors.AdapterError, *words):
        load(adapter_folder)


def test_an_adapter_whose_base_is_gone(adapter_folder):
    edit_adapter_config(adapter_folder, base_model_name_or_path="./moved/away")
    with fails(errors.ModelNotFoundError, "adapter_config.json names './moved/away'"):
        load(adapter_folder)


def test_an_adapter_without_weights(adapter_folder):
    (adapter_folder / "adapter_model.safetensors").rename(adapter_folder / "adapter_model.bin")
    with fails(errors.CheckpointError, "adapter_model.bin"):
        load(adapter_folder)


# ---- writing ----

ROWS = [{"text": "the fox"}]


def test_an_output_folder_that_is_not_ours(adapted, tmp_path):
    (tmp_path / "thesis.tex").write_text("my only copy")
    with fails(errors.OutputFolderError, "thesis.tex"):
        adapted.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_output_folder_that_is_a_file(adapted, tmp_path):
    (tmp_path / "out").write_text("")
    with fails(errors.OutputFolderError, "is a file"):
        adapted.save_pretrained(tmp_path / "out")


def test_an_adapter_of_ours_is_replaced_whole(adapted, adapter_folder):
    before = (adapter_folder / "adapter_model.safetensors").read_bytes()
    edit_adapter_weights(adapter_folder, lambda t: t[A].fill(0))
    adapted.save_pretrained(adapter_folder)
    assert (adapter_folder / "adapter_model.safetensors").read_bytes() == before
    assert sorted(path.name for path in adapter_folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


class TokenizerOnAFullDisk:
    def save_pretrained(self, folder):
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_nothing_behind(adapted, tmp_path):
    with fails(errors.OutputFolderError, "No space left", "Free some space"):
        adapted.save_pretrained(tmp_path / "out", TokenizerOnAFullDisk())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [100, 5000])
def test_a_disk_that_fills_up_leaves_nothing_behind(adapted, tmp_path, size):
    """Too small for the adapter, then for the tokenizer: both are written by libraries with errors of their own."""
    with files_of_at_most(size), fails(errors.OutputFolderError, "File too large"):
        adapted.save_pretrained(tmp_path / "out", models.tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_adapter(adapted, adapter_folder):
    before = {path.name: path.read_bytes() for path in adapter_folder.iterdir()}
    with fails(errors.OutputFolderError):
        adapted.save_pretrained(adapter_folder, TokenizerOnAFullDisk())
    assert {path.name: path.read_bytes() for path in adapter_folder.iterdir()} == before
    assert [path.name for path in adapter_folder.parent.iterdir()] == ["adapter"]


def test_a_replacement_that_breaks_leaves_the_old_adapter(adapted, adapter_folder, monkeypatch):
    """The second of the two renames that swap old and new fails."""
    before = {path.name: path.read_bytes() for path in adapter_folder.iterdir()}
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with fails(errors.OutputFolderError, "Input/output error"):
        adapted.save_pretrained(adapter_folder)
    assert {path.name: path.read_bytes() for path in adapter_folder.iterdir()} == before
    assert [path.name for path in adapter_folder.parent.iterdir()] == ["adapter"]


def test_model_tokenizer_and_run_share_a_folder_in_any_order(adapted, tmp_path):
    models.tokenizer().save_pretrained(tmp_path / "out")
    adapted.save_pretrained(tmp_path / "out")
    trainer = SFTTrainer(adapted, SFTConfig(max_steps=1, output_dir=tmp_path / "out"), train_dataset=ROWS)
    trainer.train()
    adapted.save_pretrained(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "adapter_model.safetensors", "metrics.jsonl"} <= names


def test_a_run_does_not_write_among_strangers(adapted, tmp_path):
    (tmp_path / "thesis.tex").write_text("my only copy")
    trainer = SFTTrainer(
        adapted, SFTConfig(max_steps=1, output_dir=tmp_path), train_dataset=[{"text": "the fox"}]
    )
    with fails(errors.OutputFolderError, "thesis.tex"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# ---- training ----


def test_training_without_an_adapter(model):
    with fails(errors.AdapterError, "get_peft_model"):
        SFTTrainer(model, SFTConfig(), train_dataset=[{"text": "the fox"}])


def test_no_dataset(adapted):
    with fails(errors.OptionError, "train_dataset"):
        SFTTrainer(adapted, SFTConfig())


def test_a_dataset_without_the_needed_column(adapted):
    with fails(errors.DatasetError, "texts", "Did you mean"):
        SFTTrainer(adapted, SFTConfig(), train_dataset=[{"texts": "the fox"}])


def test_a_template_that_leaves_no_token_to_train_on(adapted):
    tokenizer = get_chat_template(models.fresh_tokenizer(), "chatml")
    rows = [{"messages": [{"role": "user", "content": "hello"}]}]
    with fails(errors.DatasetError, "train on"):
        SFTTrainer(adapted, SFTConfig(assistant_only_loss=True), train_dataset=rows, tokenizer=tokenizer)


def test_settings_of_another_kind(adapted):
    with fails(errors.OptionError, "dict", "SFTConfig"):
        SFTTrainer(adapted, {"max_steps": 1}, train_dataset=ROWS)


def test_token_ids_of_another_model(adapted):
    with fails(errors.DatasetError, "99999"):
        SFTTrainer(adapted, SFTConfig(), train_dataset=[{"input_ids": [1, 99999, 3]}])


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"max_steps": 0}, "max_steps"),
        ({"num_train_epochs": 0}, "num_train_epochs"),
        ({"lr_scheduler_type": "cosin"}, "'cosine'"),
        ({"optim": "adamw_8bits"}, "'adamw_8bit'"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": "2e-4"}, "learning_rate"),
        ({"max_steps": 2.5}, "max_steps"),
        ({"max_grad_norm": -1.0}, "max_grad_norm"),
        ({"adam_beta1": 1.5}, "adam_beta1"),
        ({"warmup_ratio": 2.0}, "warmup_ratio"),
        ({"gradient_checkpointing": "blok"}, "'block'"),
        ({"learning_rat": 1e-4}, "'learning_rate'"),
        ({"push_to_hub": True}, "push_to_hub=True"),
    ],
)
def test_settings_that_cannot_be(settings, word):
    with fails(errors.OptionError, word):
        SFTConfig(**settings)
