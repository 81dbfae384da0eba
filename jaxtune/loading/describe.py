"""A model but for its weights: what its folder says of it, and an adapter's folder if that is what was named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.errors import ModelNotFoundError, OptionError
from jaxtune.loading import adapter as adapters
from jaxtune.loading.config import read_config
from jaxtune.loading.ends import read_ends
from jaxtune.loading.precision import require_known
from jaxtune.loading.tokenizer import load_tokenizer
from jaxtune.lora.tables import Tables
from jaxtune.lora.tree import Tree
from jaxtune.models.causal_lm import CausalLM
from jaxtune.models.config import ModelConfig
from jaxtune.models.context import at_length
from jaxtune.models.families import FAMILIES

DEFAULT_LENGTH = 2048
"""Unsloth's `max_seq_length`."""

Find = Callable[..., Path]
"""(hub id or folder, revision=) -> the folder."""


class Described(NamedTuple):
    folder: Path
    """Of the base's weights."""
    own_folder: Path
    """Of what was named: the adapter's, or the same."""
    name: str
    revision: str | None
    """Of the base."""
    base: CausalLM
    model: CausalLM
    """With the adapter's settings, and as many tokens as its tables have rows."""
    lora: Tree | None
    """On the host."""
    tables: Tables
    """The base's embedding and head, if the adapter's folder has them."""
    tokenizer: Any
    ends: tuple[int, ...]
    max_seq_length: int


def describe(
    name: str | Path,
    find: Find,
    *,
    revision: str | None = None,
    base_model: str | Path | None = None,
    max_seq_length: int | None = None,
    compute_dtype: str | None = None,
    full_finetuning: bool = False,
) -> Described:
    """`base_model` takes the place of the base that an adapter names."""
    named = _named(name, find, revision, base_model)
    folder, adapter = named.folder, named.adapter
    if adapter is not None:
        _refuse_full_finetuning(full_finetuning, f"{adapter.folder} is an adapter.")
    own_folder = folder if adapter is None else adapter.folder
    tokenizer_folder = own_folder if (own_folder / "tokenizer.json").is_file() else folder
    hf = read_config(folder, supported=FAMILIES)
    require_known(hf, folder)
    if hf.get("quantization_config"):
        _refuse_full_finetuning(full_finetuning, f"{folder} holds quantised weights.")
    config = FAMILIES[hf["model_type"]](hf)
    max_seq_length = max_seq_length or min(DEFAULT_LENGTH, config.max_position)
    base = CausalLM(at_length(config, max_seq_length), compute_dtype=compute_dtype)
    model, lora, tables = (base, None, {}) if adapter is None else adapters.read_weights(adapter, base)
    ends = read_ends(folder, hf)
    tokenizer = load_tokenizer(
        tokenizer_folder, eos_token_id=next(iter(ends), None), vocab_size=model.config.vocab_size
    )
    return Described(
        folder,
        own_folder,
        named.name,
        named.revision,
        base,
        model,
        lora,
        tables,
        tokenizer,
        ends,
        max_seq_length,
    )


def architecture(
    name: str | Path, find: Find, *, revision: str | None = None, base_model: str | Path | None = None
) -> ModelConfig:
    """Of a model, or of an adapter's base; weights are not needed."""
    hf = read_config(_named(name, find, revision, base_model).folder, supported=FAMILIES)
    return FAMILIES[hf["model_type"]](hf)


class _Named(NamedTuple):
    """What a name stands for."""

    name: str
    revision: str | None
    folder: Path
    """Of the base."""
    adapter: adapters.AdapterFolder | None


def _named(name: str | Path, find: Find, revision: str | None, base_model: str | Path | None) -> _Named:
    folder = find(name, revision=revision)
    if adapters.is_adapter(folder):
        adapter = adapters.read_config(folder)
        if base_model is not None:
            adapter = adapter._replace(base=str(base_model), revision=None)
        base = _find_base(adapter, find, given=base_model is not None)
        return _Named(adapter.base, adapter.revision, base, adapter)
    if base_model is not None:
        raise OptionError(
            f"base_model={str(base_model)!r}, and {folder} is no adapter.",
            expected="an adapter, which is added to that base.",
            fix="Leave base_model out.",
        )
    return _Named(str(name), revision, folder, None)


def _find_base(adapter: adapters.AdapterFolder, find: Find, given: bool = False) -> Path:
    """`given` says whether the caller named the base."""
    try:
        return find(adapter.base, revision=adapter.revision)
    except ModelNotFoundError as error:
        if given:
            raise
        raise ModelNotFoundError(
            f"{adapter.folder / 'adapter_config.json'} names {adapter.base!r} as its base model. {error.found}",
            expected=error.expected,
            fix=f"{error.fix} Or write the right folder or id into that file.",
        ) from error


def _refuse_full_finetuning(asked: bool, found: str) -> None:
    if asked:
        raise OptionError(
            f"full_finetuning=True, and {found}",
            expected="a whole model in 16 or 32 bits: every weight is trained, as it is.",
            fix="Name the original model; merge an adapter first with save_pretrained_merged.",
        )
