"""PEFT's adapter format: file names, tensor names and the keys of adapter_config.json. Reading and writing share this.

A stacked leaf {a [n, r, in], b [n, out, r]} is, for each repeat, `base_model.model.<module>.lora_A.weight` [r, in] and
`.lora_B.weight` [out, r].
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxtune.errors import AdapterError
from jaxtune.lora.config import LoraConfig
from jaxtune.lora.tree import Tree, insert, linears, modules

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTORS = {"a": "lora_A", "b": "lora_B"}

ModuleNames = Callable[[tuple], list[str]]

UNDERSTOOD_ONLY_AS: dict[str, Any] = {
    "bias": "none",
    "modules_to_save": None,
    "layers_to_transform": None,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_dora": False,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "exclude_modules": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
    "lora_ga_config": None,
    "corda_config": None,
    "eva_config": None,
    "megatron_config": None,
    "layers_pattern": None,
}
"""Settings that change what an adapter means, with the one value of each that this version understands."""

IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "inference_mode", "loftq_config", "lora_dropout",
    "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Settings that mean nothing once an adapter is trained, or nothing by themselves."""

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
"""Ways to initialise that leave the base as it is; others (pissa, olora, ...) also change the base's weights."""


def tensor_name(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.{_FACTORS[factor]}.weight"


def to_peft_config(config: LoraConfig, base: str, revision: str | None) -> dict[str, Any]:
    """The stable subset of keys, which every PEFT of the last years reads."""
    targets = config.target_modules
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": {},
        "revision": revision,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": config.use_rslora,
    }


def from_peft_config(peft: dict[str, Any], source: str) -> LoraConfig:
    """Unknown keys are ignored, as PEFT's own readers must; known ones that change the result are refused."""
    if str(peft.get("peft_type", "LORA")).upper() != "LORA":
        raise AdapterError(
            f"{source} is an adapter of type {peft['peft_type']!r}.",
            expected="LORA.",
            fix="Load it with peft, or train a LoRA adapter.",
        )
    for key, understood in UNDERSTOOD_ONLY_AS.items():
        value = peft.get(key, understood)
        if value != understood and not (not value and not understood):
            raise AdapterError(
                f"{source} sets {key}={value!r}.",
                expected=f"{key}={understood!r}: this version of jaxtune reads plain LoRA only.",
                fix="Merge that adapter with peft first, or train one without that setting.",
            )
    if peft.get("init_lora_weights", True) not in PLAIN_INITS:
        raise AdapterError(
            f"{source} was initialised by {peft['init_lora_weights']!r}, which changed the base's weights too.",
            expected="an adapter that is all that was changed.",
            fix="Convert it to plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...).",
        )
    targets = peft.get("target_modules")
    if not targets:
        raise AdapterError(
            f"{source} names no target_modules.",
            expected="the modules that the adapter belongs to.",
            fix="Save the adapter again with peft, which writes them.",
        )
    return LoraConfig(
        r=peft.get("r", 8),
        lora_alpha=peft.get("lora_alpha", 8),
        target_modules=targets,
        use_rslora=bool(peft.get("use_rslora", False)),
    )


def to_tensors(adapter: Tree, module_names: ModuleNames) -> Iterator[tuple[str, np.ndarray]]:
    for path, ab in modules(adapter):
        for factor, stacked in ab.items():
            for module, one in zip(module_names(path), np.asarray(stacked), strict=True):
                yield tensor_name(module, factor), np.ascontiguousarray(one)


def from_tensors(
    tensors: dict[str, np.ndarray], config: LoraConfig, skeleton: Tree, module_names: ModuleNames, source: str
) -> Tree:
    """The inverse of `to_tensors`. Every tensor must find its module, and every targeted module its tensors: PEFT
    itself only warns, and leaves B at zero."""
    adapter: Tree = {}
    unused = set(tensors)
    for path, (_, out, inn) in linears(skeleton):
        names = module_names(path)
        if not any(config.targets(name) for name in names):
            continue
        shapes = {"a": (config.r, inn), "b": (out, config.r)}
        ab = {
            factor: np.stack([_take(tensors, tensor_name(name, factor), shape, source) for name in names])
            for factor, shape in shapes.items()
        }
        insert(adapter, path, ab)
        unused -= {tensor_name(name, factor) for name in names for factor in shapes}
    if unused or not adapter:
        some = ", ".join(sorted(unused)[:3]) or "nothing"
        raise AdapterError(
            f"{source} holds {len(unused)} tensors that belong to no targeted module of this model: {some}.",
            expected=f"names such as {tensor_name('model.layers.0.self_attn.q_proj', 'a')}.",
            fix="Check that the adapter was trained on this architecture.",
        )
    return adapter


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, int], source: str) -> np.ndarray:
    tensor = tensors.get(name)
    if tensor is None:
        raise AdapterError(
            f"{source} has no tensor {name}.",
            expected="both factors for every targeted module of the model.",
            fix="Check that the adapter was trained on this architecture, or save it again.",
        )
    if tensor.shape != shape:
        raise AdapterError(
            f"{source}: {name} has the shape {tensor.shape}.",
            expected=f"{shape}, from the model's sizes and the rank in {CONFIG_FILE}.",
            fix="Load the adapter onto the base model that it was trained on.",
        )
    return tensor.astype(np.float32)
