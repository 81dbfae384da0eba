"""What may be wrong with a model's files, the same for every family: one typed error each, before anything is loaded,
that says what was found, what was expected and what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxtune.errors as errors
from jaxtune import FastLanguageModel
from jaxtune.models.families import FAMILIES
from tests.kit import families, models

INDEX = "model.safetensors.index.json"
NORM, DOWN = "model.norm.weight", "model.layers.1.mlp.down_proj.weight"
KEY = "model.layers.0.self_attn.k_proj.weight"


def test_every_family_is_tried():
    assert families.EACH.keys() == FAMILIES.keys()


@pytest.fixture(scope="module", params=families.EACH)
def good(request, tmp_path_factory):
    """A checkpoint of several shards."""
    folder = tmp_path_factory.mktemp("good") / "model"
    models.save(families.random_model(families.EACH[request.param]), folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture
def broken(good, tmp_path):
    """A copy to break."""
    return shutil.copytree(good, tmp_path / "model")


def load(folder: Path, **options: Any):
    return FastLanguageModel.from_pretrained(folder, dtype="float32", max_seq_length=64, **options)


def assert_fails(kind: type[errors.JaxtuneError], folder: Path, *words: str, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        load(folder, **options)
    assert type(caught.value) is kind
    for word in ("expected:", "what to do:", *words):
        assert word in str(caught.value)


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(settings_of(folder) | changes))


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def edit_index(folder: Path, edited: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": edited}))


def edit_shard(folder: Path, of: str, change) -> None:
    """Rewrites the shard that holds the tensor `of`."""
    path = folder / weight_map(folder)[of]
    tensors = {name: np.array(a) for name, a in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def last_layer(folder: Path) -> int:
    return settings_of(folder)["num_hidden_layers"] - 1


class TestWeights:
    def test_any_weight_may_be_missing(self, broken):
        """Norms and biases of every kind too: nothing is left as it was initialised."""
        whole = weight_map(broken)
        kinds = {name for name in whole if ".layers." not in name or f".{last_layer(broken)}." in name}
        assert len(kinds) > 8
        for name in kinds:
            edit_index(broken, {other: shard for other, shard in whole.items() if other != name})
            assert_fails(errors.CheckpointError, broken, f"lacks 1 of the {len(whole)} weights", name)

    def test_every_weight_may_have_another_name(self, broken):
        """As saved from a model without a head; the message names what is there instead."""
        edited = {name.removeprefix("model."): shard for name, shard in weight_map(broken).items()}
        for shard in set(edited.values()):
            tensors = {name.removeprefix("model."): a for name, a in load_file(broken / shard).items()}
            save_file(tensors, broken / shard)
        edit_index(broken, edited)
        assert_fails(errors.CheckpointError, broken, "lacks", "Did you mean 'embed_tokens.weight'")

    def test_any_weight_may_have_another_shape(self, broken):
        """Cut by a row; and the message has both shapes."""
        whole = weight_map(broken)
        for name in [name for name in whole if f".{last_layer(broken)}." in name]:
            before = broken / whole[name]
            kept, shape = before.read_bytes(), []

            def cut(tensors, name=name, shape=shape):
                shape.extend([tensors[name].shape, tensors[name][1:].shape])
                tensors[name] = tensors[name][1:].copy()

            edit_shard(broken, name, cut)
            assert_fails(errors.CheckpointError, broken, name, *map(str, shape), "config.json")
            before.write_bytes(kept)

    def test_a_layer_too_many_in_the_config(self, broken):
        changes: dict[str, Any] = {"num_hidden_layers": last_layer(broken) + 2}
        for name in ("layer_types", "no_rope_layers"):
            if name in settings_of(broken):
                changes[name] = [*settings_of(broken)[name], settings_of(broken)[name][-1]]
        edit_config(broken, **changes)
        assert_fails(errors.CheckpointError, broken, "lacks", f"model.layers.{last_layer(broken)}.")

    def test_one_without_a_place_is_reported(self, broken, caplog):
        edit_shard(broken, NORM, lambda tensors: tensors.update({"model.extra.weight": tensors[NORM]}))
        edit_index(broken, weight_map(broken) | {"model.extra.weight": weight_map(broken)[NORM]})
        with caplog.at_level("WARNING", "jaxtune"):
            load(broken)
        assert "holds 1 weights that this architecture has no place for: model.extra.weight" in caplog.text

    def test_a_whole_one_has_nothing_to_report(self, good, caplog):
        with caplog.at_level("INFO", "jaxtune"):
            load(good)
        assert not caplog.records

    @pytest.mark.parametrize("name", [NORM, DOWN], ids=["16-bit", "packed"])
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_not_finite(self, broken, name, value):
        edit_shard(broken, name, lambda tensors: tensors[name].reshape(-1).__setitem__(5, value))
        assert_fails(errors.CheckpointError, broken, name, "NaN or infinite")

    def test_integers_without_scales(self, broken):
        edit_shard(broken, DOWN, lambda tensors: tensors.update({DOWN: tensors[DOWN].astype(np.int8)}))
        assert_fails(errors.CheckpointError, broken, DOWN, "int8", "without the scales")

    def test_a_head_that_is_not_the_embedding_it_is_tied_to(self, broken):
        """transformers unties it, with a warning: a model that computes otherwise is not what was asked for."""
        edit_config(broken, tie_word_embeddings=True)
        table, head = "model.embed_tokens.weight", "lm_head.weight"
        if head not in weight_map(broken):
            table_shard = weight_map(broken)[table]
            edit_shard(broken, table, lambda tensors: tensors.update({head: tensors[table].copy()}))
            edit_index(broken, weight_map(broken) | {head: table_shard})
            load(broken)
            edit_shard(broken, head, lambda tensors: tensors[head].__setitem__((-1, -1), 1))
        assert_fails(errors.CheckpointError, broken, "ties the head", '"tie_word_embeddings": false')


class TestFiles:
    def test_a_missing_shard(self, broken):
        shard = weight_map(broken)[DOWN]
        (broken / shard).unlink()
        assert_fails(errors.CheckpointError, broken, "missing", shard)

    def test_a_truncated_shard(self, broken):
        path = broken / weight_map(broken)[DOWN]
        path.write_bytes(path.read_bytes()[:-100])
        assert_fails(errors.CheckpointError, broken, "truncated", path.name)

    def test_an_index_naming_a_tensor_that_is_not_there(self, broken):
        edit_shard(broken, DOWN, lambda tensors: tensors.pop(DOWN))
        assert_fails(errors.CheckpointError, broken, DOWN, "it is not there")

    def test_pickles_alone(self, broken):
        for path in broken.glob("model*.safetensors*"):
            path.unlink()
        (broken / "pytorch_model.bin").write_bytes(b"\x80\x02.")
        assert_fails(errors.CheckpointError, broken, "pickle", "run code")

    def test_a_tokenizer_larger_than_the_embedding(self, broken):
        tokenizer = models.fresh_tokenizer()
        tokenizer.add_tokens([f"<more {i}>" for i in range(models.VOCAB)])
        tokenizer.save_pretrained(broken)
        assert_fails(errors.ConfigError, broken, "embedding of 384 rows", "add_new_tokens")


class TestConfig:
    @pytest.mark.parametrize(
        "name",
        ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
    )
    def test_a_size_is_lacking(self, broken, name):
        """transformers would take some other model's."""
        settings = settings_of(broken)
        del settings[name]
        (broken / "config.json").write_text(json.dumps(settings))
        assert_fails(errors.ConfigError, broken, f"lacks {name}")

    @pytest.mark.parametrize(
        "name",
        ["hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "num_key_value_heads"],
    )
    def test_a_size_contradicts_the_weights(self, broken, name):
        edit_config(broken, **{name: settings_of(broken)[name] * 2})
        with pytest.raises((errors.CheckpointError, errors.ConfigError), match=r"shape|heads"):
            load(broken)

    @pytest.mark.parametrize("name", ["num_attention_heads", "max_position_embeddings", "hidden_size"])
    def test_a_number_that_cannot_be(self, broken, name):
        for value in (0, -1, "many"):
            edit_config(broken, **{name: value})
            assert_fails(errors.ConfigError, broken)

    def test_a_mistyped_model_type(self, broken):
        model_type = settings_of(broken)["model_type"]
        edit_config(broken, model_type=f"{model_type}x")
        assert_fails(
            errors.UnsupportedModelError, broken, f"'{model_type}x'", "Did you mean", f"'{model_type}'"
        )

    def test_an_activation_of_another_family(self, broken):
        name = "hidden_activation" if "hidden_activation" in settings_of(broken) else "hidden_act"
        edit_config(broken, **{name: "relu"})
        assert_fails(errors.UnsupportedModelError, broken, "'relu'", "'silu'")

    @pytest.mark.parametrize(
        ("rope", "said"),
        [
            ({"rope_type": "proportional", "rope_theta": 1e4}, "proportional"),
            ({"rope_type": "linear", "rope_theta": 1e4, "factor": "four"}, "factor|longrope"),
            ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0"),
        ],
        ids=["of an unknown kind", "stretched by no number", "with no base"],
    )
    def test_a_rope_that_cannot_be(self, broken, rope, said):
        given = settings_of(broken)["rope_parameters"]
        edit_config(
            broken, rope_parameters={**given, "full_attention": rope} if "full_attention" in given else rope
        )
        with pytest.raises(errors.ConfigError, match=said):
            load(broken)

    def test_weights_that_are_quantised_in_an_unknown_way(self, broken):
        edit_config(broken, quantization_config={"quant_method": "gptq", "bits": 4})
        assert_fails(errors.UnsupportedModelError, broken, "gptq", "original model")


class TestOptions:
    def test_two_precisions(self, good):
        assert_fails(errors.OptionError, good, "load_in_16bit", load_in_4bit=True, load_in_16bit=True)

    @pytest.mark.parametrize("targets", [["query"], "query"], ids=["a list", "a regex"])
    def test_targets_that_match_nothing(self, good, targets):
        with pytest.raises(errors.AdapterError, match=r"'query' matches no linear") as caught:
            FastLanguageModel.get_peft_model(load(good)[0], target_modules=targets)
        assert "down_proj" in caught.value.expected


class TestAdapters:
    @pytest.fixture
    def adapter(self, good, tmp_path):
        model, _ = load(good)
        FastLanguageModel.get_peft_model(model, r=4).save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    @staticmethod
    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_it_loads_with_its_base(self, adapter):
        assert load(adapter)[0].lora is not None

    def test_shapes_of_another_rank(self, adapter):
        self.edit(adapter, r=8)
        assert_fails(errors.AdapterError, adapter, "lora_A.weight has the shape (4, ", "(8, ")

    def test_a_base_of_another_width(self, adapter, tmp_path_factory):
        wide = models.save(models.random_llama(), tmp_path_factory.mktemp("wide") / "llama")
        self.edit(adapter, base_model_name_or_path=str(wide))
        with pytest.raises(errors.AdapterError, match=r"architecture|has the shape"):
            load(adapter)

    def test_settings_that_are_none(self, adapter):
        (adapter / "adapter_config.json").write_text("[]")
        assert_fails(errors.AdapterError, adapter, "adapter_config.json", "holds a list")
