"""The 16-bit original of a quantised base ("unsloth/...-bnb-4bit", say), which a merge starts from: who says which it
is, and whether it is.

Its id is what our own exporters, or transformers 4, left in the copy's config; what the copy's model card calls its
base; or the copy's name without its ending. None of these is believed before the weights are: quantised, they must give
the codes of the copy.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from jaxtune import quant
from jaxtune.errors import AdapterError, CheckpointError, ConfigError, ModelNotFoundError, OptionError
from jaxtune.export.merge import Trained
from jaxtune.loading.checkpoint import Checkpoint
from jaxtune.loading.config import CONFIG_FILE, read_json
from jaxtune.loading.dequantized import Dequantized
from jaxtune.loading.plan import HEAD, some
from jaxtune.loading.stored import Bnb4, Bnb8, Plain, Source
from jaxtune.log import get_logger

log = get_logger(__name__)

RECORD = "original_model"
"""The key, beside a copy's other quantisation settings, that no library but ours reads."""
SUFFIXES = ("-unsloth-bnb-4bit", "-bnb-4bit", "-bnb-8bit", "-FP8")
LEAST = 0.999
"""Of the codes, how many agree: weights that were moved by a thousandth of their size have 0.998 of them left in NF4,
by three thousandths 0.992."""
_ROWS, _WEIGHTS = 128, 8
"""How many rows are compared, of how many weights."""


class Base(NamedTuple):
    folder: Path
    name: str
    """The hub's id, or a path."""
    revision: str | None = None


class Fetch(Protocol):
    """`loading.hub.resolve`, with the settings that it was loaded with."""

    def __call__(self, name_or_path: str | Path, *, revision: str | None = None) -> Path: ...


def is_quantized(folder: Path) -> bool:
    return bool(read_json(folder / CONFIG_FILE).get("quantization_config"))


def original_of(base: Base, fetch: Fetch, named: str | Path | None = None) -> Base:
    """`base` itself if it is not quantised; else the original, or the model that is `named`, if it is that."""
    if named is not None:
        folder = fetch(named)
        _require_numbers(folder, named)
        require_same(base.folder, folder)
        return Base(folder, str(named))
    if not is_quantized(base.folder):
        return base
    candidates = list(_candidates(base))
    refused = []
    for name, revision in candidates:
        try:
            found = Base(fetch(name, revision=revision), name, revision)
            if is_quantized(found.folder):  # a copy of a copy: its own original comes after all others
                candidates += [each for each in _candidates(found) if each not in candidates]
                continue
            require_same(base.folder, found.folder)
        except (ModelNotFoundError, ConfigError, CheckpointError, AdapterError) as error:
            refused.append(error.found)
            continue
        log.info("%s is quantised: the merge starts from its original, %s.", base.name, name)
        return found
    raise ModelNotFoundError(
        f"A merge starts from the original 16-bit weights, and {base.name!r} holds quantised ones. "
        + (" ".join(refused) or "Neither its config nor its model card nor its name says what they were."),
        expected="an original that can be reached, and that gives these codes when it is quantised.",
        fix="Name it: original_model='org/name', or a folder. dequantize=True merges into the quantised weights as "
        "they are; save_pretrained, which writes the adapter alone, needs no original.",
    )


def require_quantized(base: Base) -> None:
    """For `dequantize`, which then is announced."""
    if not is_quantized(base.folder):
        raise OptionError(
            f"dequantize=True, and {base.name!r} holds weights that are not quantised.",
            expected="a quantised base: of any other, the merge starts from the original weights.",
            fix="Leave dequantize out.",
        )
    log.info("The merge starts from %s's quantised weights, not from their original.", base.name)


def record(base: Base) -> dict[str, Any]:
    """What a quantised copy of `base` says of its original."""
    revision = base.revision or (base.folder.name if base.folder.parent.name == "snapshots" else None)
    local = Path(base.name).expanduser()
    name = str(local.resolve()) if local.is_dir() else base.name  # from wherever the copy is loaded
    return {RECORD: {"name_or_path": name, "revision": revision}}


def record_of(trained: Trained) -> dict[str, Any]:
    """Nothing, where a merge changes anything: its original is nowhere."""
    if trained.lora is not None or trained.own or not trained.name:
        return {}
    return record(Base(trained.base, trained.name, trained.revision))


def _candidates(base: Base) -> Iterator[tuple[str, str | None]]:
    config = read_json(base.folder / CONFIG_FILE)
    match config["quantization_config"].get(RECORD):
        case {"name_or_path": str(name), "revision": str() | None as revision}:
            yield name, revision
    shortened = [base.name.removesuffix(suffix) for suffix in SUFFIXES]
    for other in dict.fromkeys([config.get("_name_or_path"), *_of_card(base.folder), *shortened]):
        if other and other != base.name:
            yield other, None


def _of_card(folder: Path) -> list[str]:
    """The models that a model card says this one was quantised from."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except Exception:  # no card, or none that can be read: YAML's errors, and huggingface_hub's own
        return []
    models = card.get("base_model") or []
    if card.get("base_model_relation", "quantized") != "quantized":
        return []
    return [str(name) for name in ([models] if isinstance(models, str) else models)]


def _require_numbers(folder: Path, named: str | Path) -> None:
    if is_quantized(folder):
        raise CheckpointError(
            f"original_model={str(named)!r} holds quantised weights.",
            expected="the original ones, in float32, float16 or bfloat16.",
            fix="Name the model that it was made from.",
        )


def require_same(copy: Path, original: Path) -> None:
    """The same weights by name and shape; and of some, the first rows give the copy's codes."""
    with Checkpoint(copy) as theirs, Checkpoint(original) as ours:
        quantized, numbers = Dequantized(theirs), Dequantized(ours)
        unlike = sorted((set(quantized.names) ^ set(numbers.names)) - {HEAD})
        unlike += [
            name
            for name in numbers.names
            if name in quantized and quantized.shape(name) != numbers.shape(name)
        ]
        if unlike:
            raise _another(copy, original, f"{some(unlike)} are not in both, or not of one shape")
        names = [name for name in quantized.names if not isinstance(quantized.sources[name].stored, Plain)]
        names = names or [name for name in quantized.names if len(quantized.shape(name)) == 2]
        for name in names[:: -(-len(names) // _WEIGHTS)]:
            rows = numbers.read(name)[:_ROWS].astype(quantized.dtype(name))
            alike = _alike(quantized.sources[name], theirs, rows)
            if alike < LEAST:
                raise _another(copy, original, f"of {name}, {alike:.1%} of the codes are the same")


def _another(copy: Path, original: Path, found: str) -> AdapterError:
    return AdapterError(
        f"{original} is not what {copy} was made from: {found}.",
        expected=f"the same weights and shapes, and more than {LEAST:.1%} of the codes.",
        fix="Name the right one with original_model=. If there is none (the copy was trained further before it was "
        "quantised, say), dequantize=True merges into the quantised weights as they are.",
    )


def _alike(source: Source, copy: Checkpoint, rows: np.ndarray) -> float:
    """How many of the original's first rows, in the dtype of the copy, have the codes that the copy has."""
    stored, arrays = source.stored, source.read(copy)
    if isinstance(stored, Plain):
        return float(np.mean(arrays["weight"][: len(rows)] == rows))
    if isinstance(stored, Bnb4):
        again = np.asarray(stored.format.quantize(jnp.asarray(rows)).codes).reshape(-1)
        differ = again ^ np.asarray(stored.decode(arrays).codes).reshape(-1)[: again.size]
        return float(np.mean([differ & 15 == 0, differ >> 4 == 0]))
    ones = {**arrays, "weight": np.ones_like(arrays["weight"])}
    values, scales = (
        np.asarray(quant.dequantize(stored.decode(each), "float32"))[: len(rows)] for each in (arrays, ones)
    )
    half = scales / 2 if isinstance(stored, Bnb8) else np.maximum(np.abs(values) / 16, scales / 1024)
    # A twentieth more, since float8's scales may have been rounded after their codes were found.
    return float(np.mean(np.abs(rows.astype(np.float32) - values) <= 1.05 * half))
