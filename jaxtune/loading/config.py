"""A model folder's config.json as the installed transformers understands it.

The defaults of its class are filled in, and old spellings (`torch_dtype`, `rope_theta` with `rope_scaling`)
become the new ones (`dtype`, `rope_parameters`).

The file itself is checked first, so that what is wrong with it is said in its own terms.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from jaxtune.errors import ConfigError, ModelNotFoundError, UnsupportedModelError, nearest

CONFIG_FILE = "config.json"
RUN_FILE = "trainer_state.json"
"""In each of a run's checkpoints."""
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What every config says for itself. transformers would take another model's: 32 heads where a file forgot its 16."""
DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")


def read_config(folder: str | Path, supported: Collection[str] | None = None) -> dict[str, Any]:
    """config.json as a plain dict. Given `supported`, other `model_type`s raise `UnsupportedModelError`."""
    path = Path(folder) / CONFIG_FILE
    raw = read_json(path)
    _check_dtype(path, raw)
    _require_supported(path, _model_type(path, raw), supported, has_own_code="auto_map" in raw)
    _require_sizes(path, raw)
    config = _normalise(path, raw)
    # transformers may read a config as another type than it says (mistral with `layer_types` is ministral).
    _require_supported(path, config["model_type"], supported)
    return config


def _no_config(folder: Path) -> ConfigError:
    """A run leaves checkpoints, some of which can only be resumed from: neither they nor their folder is a model."""
    if (folder / RUN_FILE).is_file():
        return ConfigError(
            f"{folder} is a checkpoint of full fine-tuning: the state of a run, without {CONFIG_FILE}.",
            expected="A folder that save_model or save_pretrained wrote.",
            fix="Resume it (trainer.train(resume_from_checkpoint=...)), then trainer.save_model(folder). With "
            "save_only_model=True, a run writes checkpoints that can be loaded, and not resumed.",
        )
    runs = sorted(folder.glob(f"checkpoint-*/{RUN_FILE}"), key=lambda path: path.stat().st_mtime)
    if runs:
        newest = runs[-1].parent
        is_model = any((newest / name).is_file() for name in (CONFIG_FILE, "adapter_config.json"))
        return ConfigError(
            f"{folder} holds checkpoints of a run, and no model of its own.",
            expected="A folder that save_model or save_pretrained wrote, or one checkpoint with a model in it.",
            fix=f"Pass {str(newest)!r}."
            if is_model
            else "Resume the run, then write it: trainer.save_model(folder).",
        )
    return ConfigError(
        f"{folder} has no {CONFIG_FILE}.",
        expected="A folder with config.json, as save_pretrained writes it.",
        fix="Pass the folder of the model itself (not of an adapter or a tokenizer), or fetch the file.",
    )


def read_json(path: Path) -> dict[str, Any]:
    if not path.parent.is_dir():
        raise ModelNotFoundError(
            f"There is no folder {path.parent}.",
            expected="A folder that holds a model.",
            fix="Check the path.",
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise _no_config(path.parent) from error
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}.",
            expected="A JSON object.",
            fix="Correct that line, or fetch the file again.",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}.",
            expected="A JSON object in UTF-8.",
            fix="Fetch the file again.",
        ) from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path} holds a JSON {type(raw).__name__}.",
            expected="A JSON object with the model's settings.",
            fix=f"Fetch the model's own {path.name} again.",
        )
    return raw


def _check_dtype(path: Path, raw: dict[str, Any]) -> None:
    # transformers stumbles over a wrong name only where PyTorch is installed; ours must not depend on that.
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(
            f"{path} gives the weights' dtype as {dtype!r}.",
            expected=f"One of {', '.join(DTYPES)}.",
            fix="Correct `dtype` (`torch_dtype` in older files)." + nearest(str(dtype), DTYPES),
        )


def _model_type(path: Path, raw: dict[str, Any]) -> str:
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ConfigError(
            f"{path} names no `model_type`{'' if model_type is None else f' but {model_type!r}'}.",
            expected='The architecture\'s name, as in "model_type": "llama".',
            fix="Fetch the model's own config.json again; only transformers-format models can be loaded.",
        )
    return model_type


def _require_supported(
    path: Path, model_type: str, supported: Collection[str] | None, *, has_own_code: bool = False
) -> None:
    if supported is not None and model_type not in supported:
        raise UnsupportedModelError(
            f"{path} has the `model_type` {model_type!r}, which jaxtune has no definition for.",
            expected=f"One of {', '.join(sorted(supported))}.",
            fix="Use a model of one of these families."
            + (" This one's own code is never run." if has_own_code else _meant(model_type, supported)),
        )


def _meant(model_type: str, supported: Collection[str]) -> str:
    """The name that was probably meant; a mixtral is no mistyped mistral."""
    import transformers

    return "" if model_type in transformers.CONFIG_MAPPING else nearest(model_type, supported)


def _require_sizes(path: Path, raw: dict[str, Any]) -> None:
    if "text_config" in raw:  # a larger model, which says them there
        return
    if missing := [name for name in SIZES if raw.get(name) is None]:
        raise ConfigError(
            f"{path} lacks {', '.join(missing)}.",
            expected="every size of the model: a default would be that of another one.",
            fix="Add what is missing, or fetch the model's own config.json again.",
        )


def _normalise(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    import transformers

    known = transformers.CONFIG_MAPPING
    if raw["model_type"] not in known:
        raise UnsupportedModelError(
            f"{path} has the `model_type` {raw['model_type']!r}, "
            f"which transformers {transformers.__version__} does not know.",
            expected="An architecture that the installed transformers knows; its defaults are needed.",
            fix="Upgrade transformers if the model is new." + nearest(raw["model_type"], known.keys()),
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            path.parent, trust_remote_code=False, local_files_only=True
        )
    # Its validators raise whatever fits them (KeyError, TypeError, huggingface_hub's own): no base in common.
    except Exception as error:
        raise ConfigError(
            f"{path} is not a consistent {raw['model_type']} config: {_one_line(error)}.",
            expected=f"Settings that transformers {transformers.__version__} accepts.",
            fix="Correct the setting named above, or fetch the model's own config.json again.",
        ) from error
    settings = config.to_dict()
    settings.pop("_name_or_path", None)  # where the file lay, which is nothing about the model
    return settings


def _one_line(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()).removesuffix(".")
