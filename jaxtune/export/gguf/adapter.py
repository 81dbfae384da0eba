"""An adapter as GGUF, for llama.cpp to add to its base: A and B of every weight that has them, by that weight's name.

llama.cpp multiplies B A by one alpha over the rank that A has. What settings say otherwise (rsLoRA, patterns) is put
into B.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.errors import AdapterError, OptionError, nearest
from jaxtune.export.gguf import tensors
from jaxtune.export.gguf.architectures import Architecture, architecture_of
from jaxtune.export.gguf.mixtures import MIXTURES
from jaxtune.export.gguf.quants import TensorType, encode
from jaxtune.export.gguf.writer import QUANTIZATION_VERSION, TensorInfo, write_gguf
from jaxtune.export.ollama import MODELFILE, modelfile
from jaxtune.export.verify.gguf import Written, verify_gguf
from jaxtune.folders import named, staged
from jaxtune.lora.config import EMBEDDING_PATH, HEAD_PATH, LOFTQ, PISSA, LoraConfig, ModuleNames
from jaxtune.lora.tree import Tree, layers
from jaxtune.models.config import ModelConfig

METHODS = {
    "f32": TensorType.F32,
    "f16": TensorType.F16,
    "bf16": TensorType.BF16,
    "q8_0": TensorType.Q8_0,
    "auto": TensorType.F16,
    "fast_quantized": TensorType.F16,
}
"""Of what is not said, float16: adapters are float32 here, of which it keeps more than bfloat16."""


def save_adapter_gguf(
    folder: str | Path,
    lora: Tree,
    lora_config: LoraConfig,
    module_names: ModuleNames,
    config: ModelConfig,
    *,
    tokenizer: Any,
    name: str,
    quantization_method: str = "f16",
    verify: bool = True,
) -> Path:
    """Writes the file, and a Modelfile that adds it to a base of the same name, which is to be put beside it. `name` is
    the base model's. Gives the file's path."""
    type = _type_of(quantization_method)
    _require_plain(lora_config, tied=config.tie_word_embeddings)
    architecture = architecture_of(config)
    title = Path(name).name or "model"
    alpha = np.float32(lora_config.scale * lora_config.r)
    found = dict(_factors(lora, lora_config, module_names, architecture, config, float(alpha)))
    metadata = {
        "general.architecture": architecture.name,
        "general.type": "adapter",
        "general.name": f"{title} LoRA",
        "general.file_type": np.uint32(MIXTURES[type.name.lower()].file_type),
        "general.quantization_version": np.uint32(QUANTIZATION_VERSION),
        "adapter.type": "lora",
        "adapter.lora.alpha": alpha,
    }
    # Rows of B are as long as the rank: blocks may not fill them.
    fitting = lambda array: type if array.shape[1] % type.block == 0 else TensorType.F16
    infos = [TensorInfo(tensor, array.shape, fitting(array)) for tensor, array in found.items()]
    file, folder = f"{title}-lora.{type.name}.gguf", named(folder)
    written = Written()

    def encoded(info: TensorInfo) -> np.ndarray:
        blocks = encode(found[info.name], info.type, info.name)
        if verify:
            written.note(info, found[info.name], None, blocks)
        return blocks

    with staged(folder, marker=MODELFILE) as stage:
        write_gguf(stage / file, metadata, infos, encoded)
        if verify:
            verify_gguf(stage / file, metadata, infos, written)
        if tokenizer is not None:
            text = modelfile(f"{title}.gguf", tokenizer, adapter_file=file)
            (stage / MODELFILE).write_text(text, encoding="utf-8")
    return folder / file


def _factors(
    lora: Tree,
    lora_config: LoraConfig,
    module_names: ModuleNames,
    architecture: Architecture,
    config: ModelConfig,
    alpha: float,
) -> Iterator[tuple[str, np.ndarray]]:
    host = dict(layers(lora, lora_config, module_names))
    for name, hf_name in tensors.gguf_names(
        config, (f"{module}.weight" for module in host), "The adapter"
    ).items():
        module = hf_name.removesuffix(".weight")
        a, b = (np.asarray(host[module][leaf], np.float32) for leaf in ("a", "b"))
        factor = lora_config.scale_of(module) * len(a) / alpha
        if module == EMBEDDING_PATH:  # its rows are looked up in the one that has them
            yield f"{name}.lora_a", b
            yield f"{name}.lora_b", np.ascontiguousarray(a.T) * np.float32(factor)
        else:
            yield f"{name}.lora_a", a
            yield f"{name}.lora_b", tensors.as_stored(architecture, config, name, b * np.float32(factor))


def _type_of(method: str) -> TensorType:
    if not isinstance(method, str) or method not in METHODS:
        raise OptionError(
            f"quantization_method={method!r} for an adapter.",
            expected=f"one of {', '.join(METHODS)}: other types are for whole models.",
            fix=f"Leave it out for f16.{nearest(str(method), METHODS)}",
        )
    return METHODS[method]


def _require_plain(config: LoraConfig, *, tied: bool) -> None:
    """llama.cpp's adapters are A and B of weights that it has."""
    of_table = [path for path in (EMBEDDING_PATH, HEAD_PATH) if config.targets(path)]
    beyond = {
        "use_dora=True": config.use_dora,
        f"modules_to_save={list(config.modules_to_save)}": bool(config.modules_to_save),
        f"bias={config.bias!r}": config.bias != "none",
        f"init_lora_weights={config.init_lora_weights!r}, which belongs to a changed base": config.init_lora_weights
        in (PISSA, LOFTQ),
        f"A and B for {' and '.join(of_table)}, which are one table": tied and bool(of_table),
    }
    for found, is_so in beyond.items():
        if is_so:
            raise AdapterError(
                f"The adapter has {found}.",
                expected="A and B of weights, which is all that llama.cpp's adapters hold.",
                fix="Write the merged model instead, with save_pretrained_gguf.",
            )
