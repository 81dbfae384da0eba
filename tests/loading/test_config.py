"""Reading config.json: defaults filled in, old spellings made new, and a clear error for each thing wrong with it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxtune.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from jaxtune.loading.config import read_config
from tests.kit import published

REPOSITORY_ROOT = Path(__file__).parents[2]
LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def write(folder: Path, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(TINY | settings))
    return folder


def published_llamas() -> list[Path]:
    def is_llama(folder: Path) -> bool:
        return json.loads((folder / "config.json").read_text())["model_type"] in LLAMA_FAMILY

    return list(filter(is_llama, published.folders("config.json")))


class TestNormalising:
    def test_defaults_are_filled_in(self, tmp_path: Path):
        config = read_config(write(tmp_path))
        assert config["rms_norm_eps"] == 1e-6
        assert config["num_key_value_heads"] == 4
        assert config["head_dim"] == 16
        assert config["tie_word_embeddings"] is False
        assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}

    def test_old_spellings_become_new_ones(self, tmp_path: Path):
        old = {
            "torch_dtype": "bfloat16",
            "rope_theta": 5e5,
            "rope_scaling": {"type": "linear", "factor": 2.0},
        }
        config = read_config(write(tmp_path, **old))
        assert config["dtype"] == "bfloat16"
        rope = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
        assert config["rope_parameters"].items() >= rope.items()
        assert "torch_dtype" not in config and "rope_theta" not in config

    def test_new_spellings_stay(self, tmp_path: Path):
        rope = {"rope_type": "default", "rope_theta": 1e6}
        config = read_config(write(tmp_path, dtype="float16", rope_parameters=rope))
        assert config["dtype"] == "float16"
        assert config["rope_parameters"] == rope

    def test_it_is_plain_and_knows_no_path(self, tmp_path: Path):
        config = read_config(write(tmp_path, torch_dtype="bfloat16"))
        assert str(tmp_path) not in json.dumps(config)

    @pytest.mark.parametrize("folder", published_llamas(), ids=lambda folder: folder.name)
    def test_published_configs_keep_what_they_say(self, folder: Path):
        raw = json.loads((folder / "config.json").read_text())
        config = read_config(folder, supported=LLAMA_FAMILY)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "vocab_size",
        ):
            assert config[name] == raw[name]
        assert config["dtype"] == raw.get("dtype", raw.get("torch_dtype"))
        theta = raw.get("rope_theta", 10000.0)
        assert config["rope_parameters"]["rope_theta"] == raw.get("rope_parameters", {}).get(
            "rope_theta", theta
        )
        assert config["num_key_value_heads"] == raw.get("num_key_value_heads", raw["num_attention_heads"])
        json.dumps(config)


class TestErrors:
    def test_no_folder(self, tmp_path: Path):
        with pytest.raises(ModelNotFoundError, match="no folder"):
            read_config(tmp_path / "gone")

    def test_no_config_file(self, tmp_path: Path):
        with pytest.raises(ConfigError, match=r"has no config\.json"):
            read_config(tmp_path)

    def test_bad_json_is_located(self, tmp_path: Path):
        (tmp_path / "config.json").write_text('{\n  "model_type": "llama",\n  "hidden_size" 64\n}')
        with pytest.raises(ConfigError, match=r"not valid JSON: .* at line 3, column 17"):
            read_config(tmp_path)

    def test_text_in_another_encoding(self, tmp_path: Path):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-16")
        with pytest.raises(ConfigError, match="cannot be read"):
            read_config(tmp_path)

    def test_json_that_is_no_object(self, tmp_path: Path):
        (tmp_path / "config.json").write_text("[1, 2]")
        with pytest.raises(ConfigError, match="holds a JSON list"):
            read_config(tmp_path)

    @pytest.mark.parametrize("model_type", [None, "", 3])
    def test_no_model_type(self, model_type: Any, tmp_path: Path):
        with pytest.raises(ConfigError, match="no `model_type`"):
            read_config(write(tmp_path, model_type=model_type))

    def test_a_model_type_outside_of_what_is_supported(self, tmp_path: Path):
        with pytest.raises(UnsupportedModelError) as caught:
            read_config(write(tmp_path, model_type="llama3"), supported=["llama", "qwen3"])
        assert "'llama3'" in caught.value.found
        assert caught.value.expected == "One of llama, qwen3."
        assert "Did you mean 'llama'?" in caught.value.fix

    @pytest.mark.parametrize(
        "settings",
        [{"model_type": "mixtral"}, {"model_type": "lamma", "auto_map": {"AutoConfig": "own.Config"}}],
    )
    def test_a_model_of_its_own_is_no_mistyped_one(self, settings: dict[str, Any], tmp_path: Path):
        with pytest.raises(UnsupportedModelError) as caught:
            read_config(write(tmp_path, **settings), supported=["llama", "mistral"])
        assert "Did you mean" not in caught.value.fix

    def test_a_model_type_that_transformers_does_not_know(self, tmp_path: Path):
        with pytest.raises(UnsupportedModelError, match=r"'llamma', which transformers .* does not know"):
            read_config(write(tmp_path, model_type="llamma"))

    def test_a_model_type_that_transformers_reads_as_an_unsupported_one(self, tmp_path: Path):
        disguised = write(tmp_path, model_type="mistral", layer_types=["full_attention"] * 2)
        with pytest.raises(UnsupportedModelError, match="'ministral'"):
            read_config(disguised, supported=["llama", "mistral"])

    @pytest.mark.parametrize(
        "settings, said",
        [
            ({"num_attention_heads": 5}, "not a multiple of the number of attention heads"),
            ({"hidden_size": "64"}, "'hidden_size' expected int"),
            ({"layer_types": ["full_attention"]}, "must be equal to the number of `layer_types`"),
            ({"rope_scaling": {"type": "linear"}}, "Missing required keys in `rope_parameters`"),
        ],
    )
    def test_settings_that_contradict_one_another(self, settings: dict[str, Any], said: str, tmp_path: Path):
        with pytest.raises(ConfigError) as caught:
            read_config(write(tmp_path, **settings))
        assert said in caught.value.found

    def test_an_unknown_dtype(self, tmp_path: Path):
        with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
            read_config(write(tmp_path, torch_dtype="bfloat"))


def test_it_works_without_torch_and_imports_transformers_only_when_called(tmp_path: Path):
    code = (
        "import sys; sys.modules['torch'] = None\n"  # makes `import torch` fail, and transformers not find it
        "from jaxtune.loading.config import read_config\n"
        "assert 'transformers' not in sys.modules\n"
        "assert read_config(sys.argv[1])['dtype'] == 'bfloat16'\n"
    )
    folder = str(write(tmp_path, torch_dtype="bfloat16"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, folder],
        cwd=REPOSITORY_ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
