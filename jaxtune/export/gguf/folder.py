"""A merged model as GGUF files with a Modelfile, straight from the original checkpoint: no merged folder in between.

The folder is `<name>_gguf/`, a file in it `<model>.<METHOD>.gguf`, as Unsloth's users expect them.
"""

import contextlib
import glob
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxtune.errors import OptionError, nearest
from jaxtune.export.ahead import ahead
from jaxtune.export.gguf import ropes, shards, tensors
from jaxtune.export.gguf.architectures import Architecture, architecture_of
from jaxtune.export.gguf.imatrix import Importance, for_tensor, read_imatrix
from jaxtune.export.gguf.mixtures import MIXTURES
from jaxtune.export.gguf.quants import encode
from jaxtune.export.gguf.vocab import model_name, vocabulary
from jaxtune.export.gguf.writer import QUANTIZATION_VERSION, TensorInfo, write_gguf
from jaxtune.export.hf_folder import parse_size
from jaxtune.export.merge import MergedCheckpoint, Trained
from jaxtune.export.ollama import MODELFILE, modelfile, sampling_of
from jaxtune.export.verify.gguf import Written, verify_gguf
from jaxtune.folders import named, staged
from jaxtune.log import counted, get_logger
from jaxtune.models.config import ModelConfig

log = get_logger(__name__)

ALIASES = {
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k_xs": "q3_k_s",
}
AS_STORED = "not_quantized"
"""16 bits, of the kind that the checkpoint stores."""
KNOWN = (*MIXTURES, *ALIASES, AS_STORED)


def save_gguf(
    folder: str | Path,
    trained: Trained,
    *,
    tokenizer: Any,
    name: str,
    quantization_method: str | Sequence[str] | None = "fast_quantized",
    imatrix_file: str | Path | None = None,
    max_shard_size: int | str | None = None,
    verify: bool = True,
) -> list[Path]:
    """Writes `<folder>_gguf/`: a file for each method, and a Modelfile for the first. `name` is what the model is
    called: its hub id, say, of which files take the last part. Gives the paths of the files.

    `imatrix_file` is what llama-imatrix measured with this model; quantised types then keep what matters most. With a
    `max_shard_size`, a method's file is several, of at most that size."""
    given = check_methods(quantization_method, imatrix_file)
    limit = None if max_shard_size is None else parse_size(max_shard_size)
    importance = {} if imatrix_file is None else read_imatrix(imatrix_file)
    folder = Path(f"{named(folder)}_gguf")
    title = Path(name).name or "model"
    with trained.open() as checkpoint:
        merged = MergedCheckpoint.of(checkpoint, trained)
        config = merged.settings(trained.config)
        architecture = architecture_of(config)
        stems = {f"{title}.{method.upper()}": method for method in (_resolve(each, merged) for each in given)}
        model = _Model(
            merged,
            architecture,
            config,
            names=tensors.gguf_names(config, merged.names, trained.base),
            words={
                "general.name": model_name(tokenizer, title),
                **vocabulary(tokenizer, config.vocab_size),
            },
            importance=importance,
        )
        earlier = [
            form for stem in map(glob.escape, stems) for form in (f"{stem}.gguf", shards.pattern(stem))
        ]
        with staged(folder, marker=MODELFILE, replaces=earlier) as stage:
            files = [_write(stage, stem, model, method, limit, verify) for stem, method in stems.items()]
            whole = f"{next(iter(stems))}.gguf"
            text = _for_shards(files[0], whole) + modelfile(whole, tokenizer, sampling_of(trained.base))
            (stage / MODELFILE).write_text(text, encoding="utf-8")
    return [folder / file for of_method in files for file in of_method]


def _for_shards(files: list[str], whole: str) -> str:
    """What has to be done before Ollama can read them: a comment for the Modelfile, which names the `whole`."""
    if files == [whole]:
        return ""
    command = f"llama-gguf-split --merge {files[0]} {whole}"
    log.warning("Ollama does not read a model that is in several files. To make it one: %s", command)
    return f"# Ollama reads one file only, which this makes: {command}\n"


def check_methods(given: str | Sequence[str] | None, imatrix_file: str | Path | None = None) -> list[str]:
    """The list of what was asked for, every name known; None is the default, as in Unsloth."""
    methods = [given] if isinstance(given, str) else ["fast_quantized"] if given is None else list(given)
    if not methods:
        raise OptionError(
            "quantization_method is an empty list.",
            expected=f"some of {', '.join(KNOWN)}.",
            fix="Leave it out for q8_0.",
        )
    for method in methods:
        if method not in KNOWN:
            raise OptionError(
                f"quantization_method={method!r}.",
                expected=f"one of {', '.join(KNOWN)}, or a list of them.",
                fix="Use one of these." + nearest(str(method), KNOWN),
            )
        if imatrix_file is None and method in MIXTURES and MIXTURES[method].needs_importance:
            raise OptionError(
                f"quantization_method={method!r} without an importance matrix.",
                expected="an imatrix_file: this few bits are worth nothing unless they go to the columns that matter.",
                fix="Give what save_imatrix or llama-imatrix measured with this model, or take q2_k, q3_k_s or iq4_xs.",
            )
    return methods


def _resolve(method: str, merged: MergedCheckpoint) -> str:
    if method == "q3_k_xs":
        log.info(
            "q3_k_xs is not a type of llama.cpp's any more; q3_k_s, the smallest of 3 bits, is written instead."
        )
    if method != AS_STORED:
        return ALIASES.get(method, method)
    # float32 becomes f16, which is eight times as precise as bf16; what it cannot hold raises.
    return "bf16" if any(merged.dtype(name) == ml_dtypes.bfloat16 for name in merged.names) else "f16"


class _Model(NamedTuple):
    """What all of a model's files are made of."""

    merged: MergedCheckpoint
    architecture: Architecture
    config: ModelConfig
    names: dict[str, str]
    """GGUF name -> Hugging Face name."""
    words: dict[str, Any]
    """The key/values of the tokenizer."""
    importance: Importance


def _write(stage: Path, stem: str, model: _Model, method: str, limit: int | None, verify: bool) -> list[str]:
    """Gives the names of the files."""
    merged, architecture, config, names, words, importance = model
    shapes = {name: merged.shape(source) for name, source in names.items()}
    metadata = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.size_label": size_label(sum(map(math.prod, shapes.values()))),
        "general.file_type": np.uint32(MIXTURES[method].file_type),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
        **tensors.settings(architecture, config),
        **words,
    }
    infos = list(tensors.file_tensors(architecture, config, shapes, method, weighted=bool(importance)))
    if importance and MIXTURES[method].most.block > 1:
        missing = [info.name for info in infos if info.type.block > 1 and info.name not in importance]
        if missing:
            log.info(
                "The importance matrix has nothing for %s: %s.",
                counted(len(missing), "tensor"),
                ", ".join(missing[:4]),
            )
    factors = ropes.tensors(config)
    written = Written()

    def stored(info: TensorInfo) -> np.ndarray:
        if info.name in factors:
            return factors[info.name]
        return tensors.as_stored(architecture, config, info.name, merged.read(names[info.name]))

    def encoded(info: TensorInfo) -> np.ndarray:
        _, array = next(arrays)
        columns = for_tensor(importance, info.name, info.shape)
        blocks = encode(array, info.type, info.name, columns)
        if verify:
            written.note(info, array, columns, blocks)
        return blocks

    files = shards.split(stem, metadata, infos, limit)
    with contextlib.closing(ahead(((info, 2 * math.prod(info.shape)) for info in infos), stored)) as arrays:
        for shard in files:
            write_gguf(stage / shard.file, shard.metadata, shard.tensors, encoded)
            if verify:
                verify_gguf(stage / shard.file, shard.metadata, shard.tensors, written)
    return [shard.file for shard in files]


def size_label(numbers: int) -> str:
    """8030261248 -> "8.0B"; 70553706496 -> "71B"; 134515008 -> "135M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if numbers >= size:
            return f"{numbers / size:.{1 if numbers < 10 * size else 0}f}{unit}"
    return f"{numbers / 1e3:.0f}K"
