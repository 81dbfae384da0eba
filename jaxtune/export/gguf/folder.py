"""A merged model as GGUF files with a Modelfile, straight from the original checkpoint: no merged folder in between.

The folder is `<name>_gguf/`, a file in it `<model>.<METHOD>.gguf`, as Unsloth's users expect them.
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxtune.errors import OptionError, nearest
from jaxtune.export.ahead import ahead
from jaxtune.export.gguf import ropes, tensors
from jaxtune.export.gguf.architectures import Architecture, architecture_of
from jaxtune.export.gguf.imatrix import Importance, for_tensor, read_imatrix
from jaxtune.export.gguf.mixtures import MIXTURES
from jaxtune.export.gguf.quants import encode
from jaxtune.export.gguf.vocab import model_name, vocabulary
from jaxtune.export.gguf.writer import QUANTIZATION_VERSION, TensorInfo, write_gguf
from jaxtune.export.merge import MergedCheckpoint, Trained
from jaxtune.export.ollama import MODELFILE, modelfile, sampling_of
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
) -> list[Path]:
    """Writes `<folder>_gguf/`: a file for each method, and a Modelfile for the first. `name` is what the model is
    called: its hub id, say, of which files take the last part. Gives the paths of the files.

    `imatrix_file` is what llama-imatrix measured with this model; quantised types then keep what matters most."""
    given = check_methods(quantization_method, imatrix_file)
    importance = {} if imatrix_file is None else read_imatrix(imatrix_file)
    folder = Path(f"{named(folder)}_gguf")
    title = Path(name).name or "model"
    with trained.open() as checkpoint:
        merged = MergedCheckpoint.of(checkpoint, trained)
        config = merged.settings(trained.config)
        architecture = architecture_of(config)
        methods = list(dict.fromkeys(_resolve(method, merged) for method in given))
        files = [f"{title}.{method.upper()}.gguf" for method in methods]
        words = {
            "general.name": model_name(tokenizer, title),
            **vocabulary(tokenizer, config.vocab_size),
        }
        names = tensors.gguf_names(config, merged.names, trained.base)
        with staged(folder, marker=MODELFILE) as stage:
            for file, method in zip(files, methods, strict=True):
                _write(stage / file, merged, architecture, config, names, words, method, importance)
            ollama = modelfile(files[0], tokenizer, sampling_of(trained.base))
            (stage / MODELFILE).write_text(ollama, encoding="utf-8")
    return [folder / file for file in files]


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
                fix="Give what llama-imatrix measured with this model, or take q2_k, q3_k_s or iq4_xs.",
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


def _write(
    path: Path,
    merged: MergedCheckpoint,
    architecture: Architecture,
    config: ModelConfig,
    names: dict[str, str],
    words: dict[str, Any],
    method: str,
    importance: Importance,
) -> None:
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

    def stored(info: TensorInfo) -> np.ndarray:
        if info.name in factors:
            return factors[info.name]
        return tensors.as_stored(architecture, config, info.name, merged.read(names[info.name]))

    def encoded(info: TensorInfo) -> np.ndarray:
        _, array = next(arrays)
        return encode(array, info.type, info.name, for_tensor(importance, info.name, info.shape))

    with contextlib.closing(ahead(((info, 2 * math.prod(info.shape)) for info in infos), stored)) as arrays:
        write_gguf(path, metadata, infos, encoded)


def size_label(numbers: int) -> str:
    """8030261248 -> "8.0B"; 70553706496 -> "71B"; 134515008 -> "135M"."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if numbers >= size:
            return f"{numbers / size:.{1 if numbers < 10 * size else 0}f}{unit}"
    return f"{numbers / 1e3:.0f}K"
