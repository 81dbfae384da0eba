"""A model's folder as Hugging Face's libraries read it: weights in shards, configs, generation settings, tokenizer.

It appears whole or not at all. Of the original's files that nothing changes, the bytes are copied.
"""

import collections
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import OptionError, OutputFolderError
from jaxtune.export.safetensors_stream import Entry, write_safetensors
from jaxtune.export.verify.checksums import Checksums
from jaxtune.export.verify.tensors import verify_tensors
from jaxtune.folders import named, staged
from jaxtune.loading.checkpoint import INDEX_FILE, SINGLE_FILE
from jaxtune.loading.config import CONFIG_FILE, read_config
from jaxtune.loading.ends import GENERATION_FILE
from jaxtune.loading.tokenizer import is_tokenizer_of, save_tokenizer
from jaxtune.lora import peft_format
from jaxtune.models import context
from jaxtune.models.config import ModelConfig

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", SENTENCEPIECE_FILE,
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
EARLIER_WEIGHTS = ("model*.safetensors", INDEX_FILE)
EARLIER = (*EARLIER_WEIGHTS, GENERATION_FILE, *TOKENIZER_FILES, *PROCESSOR_FILES)
"""What an earlier save may have left: its model.safetensors would win over a new index, its chat template over none."""
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Shards = dict[str, list[Entry]]
"""File name -> what it holds."""


def write_model(
    folder: str | Path,
    base: Path,
    config: ModelConfig,
    shards: Shards,
    read: Callable[[str], np.ndarray],
    *,
    dtype: np.dtype,
    tokenizer: Any = None,
    quantization_config: dict[str, Any] | None = None,
    check: Callable[[Path], None] | None = None,
) -> None:
    """`base` is the folder whose settings and tokenizer it gets, but for what `config` has otherwise: more tokens, or
    longer sequences. `dtype` is that of what is not quantised. `tokenizer=None`, or one that is the original's, copies
    the original's files; any other is saved as it is, with the chat template that it was trained with. With a `check`,
    the bytes of the weights are read back and compared; then it is given the folder, complete but for its name, and
    raises if that is not right."""
    folder = named(folder)
    refuse_other_models(folder, base)
    checksums = Checksums()
    with staged(folder, marker=CONFIG_FILE, replaces=EARLIER) as stage:
        for file, entries in shards.items():
            write_safetensors(stage / file, entries, read if check is None else checksums.of(read))
        if set(shards) != {SINGLE_FILE}:
            _write_json(stage / INDEX_FILE, _index(shards))
        end_id = getattr(tokenizer, "eos_token_id", None)
        _write_settings(stage, base, config, dtype, end_id, quantization_config)
        _write_tokenizer(stage, base, tokenizer)  # last: config.json has a say in how it is read again
        if check is not None:
            verify_tensors(stage, shards, checksums)
            check(stage)


def refuse_other_models(folder: Path, base: Path) -> None:
    if folder.exists() and folder.resolve() == base.resolve():
        raise OutputFolderError(
            f"{folder} is the base model itself.",
            expected="another folder: the base stays as it is, for its other adapters.",
            fix="Choose another name.",
        )
    if (folder / peft_format.CONFIG_FILE).is_file():
        raise OutputFolderError(
            f"{folder} holds an adapter.",
            expected="a folder of its own: whoever loads one that has both takes the adapter.",
            fix="Choose another name.",
        )


def parse_size(size: int | str) -> int:
    """5_000_000_000, "5GB" or "500MB" -> bytes, as transformers reads them."""
    text = str(size).strip().upper().replace(" ", "")
    number, unit = next(((text.removesuffix(u), _UNITS[u]) for u in _UNITS if text.endswith(u)), (text, 1))
    try:
        parsed = int(float(number) * unit)
    except (ValueError, OverflowError):
        parsed = 0
    if parsed < 1:
        raise OptionError(
            f"max_shard_size={size!r}.",
            expected='a number of bytes, or one with a unit, such as "5GB".',
            fix="Leave max_shard_size out for the default.",
        )
    return parsed


def split(entries: Iterable[Entry], limit: int) -> Shards:
    """Files of at most so many bytes, or of one tensor; one alone has the name of a single file."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and nbytes(groups[-1]) + entry.nbytes > limit:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def main_dtype(shards: Shards) -> np.dtype:
    """That of most of the bytes."""
    total: collections.Counter[np.dtype] = collections.Counter()
    for entries in shards.values():
        for entry in entries:
            total[entry.dtype] += entry.nbytes
    return total.most_common(1)[0][0]


def _index(shards: Shards) -> dict[str, Any]:
    everything = [entry for entries in shards.values() for entry in entries]
    return {
        "metadata": {
            "total_parameters": sum(entry.size for entry in everything),
            "total_size": nbytes(everything),
        },
        "weight_map": {entry.name: file for file, entries in shards.items() for entry in entries},
    }


def nbytes(entries: Iterable[Entry]) -> int:
    return sum(entry.nbytes for entry in entries)


def _write_tokenizer(stage: Path, base: Path, tokenizer: Any) -> None:
    """transformers writes other files than most models were published with, which not everyone reads."""
    as_it_was = tokenizer is None or is_tokenizer_of(tokenizer, base)
    if not as_it_was:
        save_tokenizer(tokenizer, stage)
    # transformers does not write a SentencePiece model again, and llama.cpp's converter asks for it.
    for name in (*(TOKENIZER_FILES if as_it_was else (SENTENCEPIECE_FILE,)), *PROCESSOR_FILES):
        if (base / name).is_file():
            shutil.copyfile(base / name, stage / name)


def _write_settings(
    stage: Path,
    base: Path,
    model: ModelConfig,
    dtype: np.dtype,
    end_id: int | None,
    quantization_config: dict[str, Any] | None,
) -> None:
    """config.json says what the weights are now. Where generation stops is said once, by the file that transformers
    reads first, and the end token that a chat template brought belongs to it."""
    original = json.loads((base / CONFIG_FILE).read_text(encoding="utf-8"))
    config = context.as_hf(original, model)
    config.pop("quantization_config", None)
    if read_config(base).get("tie_word_embeddings") and not model.tie_word_embeddings:
        config["tie_word_embeddings"] = False
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype.name
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    generation_file = base / GENERATION_FILE
    if generation_file.is_file():
        generation = json.loads(generation_file.read_text(encoding="utf-8"))
        if _also_stop_at(generation, end_id):
            _write_json(stage / GENERATION_FILE, generation)
        else:
            shutil.copyfile(generation_file, stage / GENERATION_FILE)
    else:
        _also_stop_at(config, end_id)
    _write_json(stage / CONFIG_FILE, config)


def _also_stop_at(settings: dict[str, Any], end_id: int | None) -> bool:
    """Adds a token to `eos_token_id`, and says whether that changed anything."""
    known = settings.get("eos_token_id")
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if end_id is None or end_id in ids:
        return False
    settings["eos_token_id"] = [*ids, end_id] if ids else end_id
    return True


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
