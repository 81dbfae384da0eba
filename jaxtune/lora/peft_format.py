"""PEFT's adapter format: file names, tensor names and the keys of adapter_config.json. Reading and writing share this.

Of each layer's module: `base_model.model.<module>.lora_A.weight` [r, in], `.lora_B.weight` [out, r] in its own rank,
with DoRA `.lora_magnitude_vector` [out], a trained bias, and of a module that is trained whole its plain `.weight`.
Of the embedding, which PEFT takes for a linear of one-hot inputs, `.lora_embedding_A` [r, V] and `.lora_embedding_B`
[M, r]: our b and a, turned. A head that remains the embedding is written as well, with the same values.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxtune.errors import AdapterError
from jaxtune.lora.config import EMBEDDING, EMBEDDING_PATH, HEAD_PATH, LOFTQ, PISSA, LoraConfig, ModuleNames
from jaxtune.lora.tree import Tree, adaptable, at, cut, insert, layers

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_SUFFIXES = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector", "weight": "weight"}
_TURNED = {"a": "lora_embedding_B", "b": "lora_embedding_A"}
"""Of the embedding."""

UNDERSTOOD_ONLY_AS: dict[str, Any] = {
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
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
}
"""Settings that change what an adapter means, with the one value of each that this version understands."""

IRRELEVANT = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
"""Settings that mean nothing once an adapter is trained, or nothing by themselves."""

READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "exclude_modules", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "modules_to_save", "r", "rank_pattern", "target_modules",
    "use_dora", "use_rslora",
}  # fmt: skip

PLAIN_INITS = (True, False, None, "gaussian", "orthogonal")
"""Ways to initialise that leave the base as it is: of no account once an adapter is trained."""


def tensor_name(module: str, leaf: str, *, adapted: bool = True) -> str:
    """A bias stays with its linear, which PEFT wraps where there is an adapter."""
    suffixes = {**_SUFFIXES, **_TURNED} if module == EMBEDDING_PATH else _SUFFIXES
    suffix = suffixes.get(leaf) or ("base_layer.bias" if adapted else "bias")
    return f"{PREFIX}{module}.{suffix}"


def to_peft_config(config: LoraConfig, base: str, revision: str | None) -> dict[str, Any]:
    """The stable subset of keys, which every PEFT of the last years reads, in the alphabet's order. Patterns keep their
    own order: the first that matches holds."""
    listed = lambda names: names if isinstance(names, str) or names is None else sorted(names)
    keys: dict[str, Any] = {
        "alpha_pattern": dict(config.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        # PEFT takes the principal part out of the base again when it sees "pissa"; other ways have had their effect.
        "init_lora_weights": PISSA if config.init_lora_weights == PISSA else True,
        "layers_pattern": None if config.layers_pattern is None else list(config.layers_pattern),
        "layers_to_transform": listed(config.layers_to_transform),
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "modules_to_save": list(config.modules_to_save) or None,
        "peft_type": "LORA",
        "r": config.r,
        "rank_pattern": dict(config.rank_pattern),
        "revision": revision,
        "target_modules": listed(config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
    }
    if config.init_lora_weights == LOFTQ:  # for us, if it comes to a merge: PEFT says that it is not used
        keys["loftq_config"] = {"loftq_bits": 4, "loftq_iter": 1}
    if config.exclude_modules is not None:  # younger than the others
        keys["exclude_modules"] = listed(config.exclude_modules)
    if config.ensure_weight_tying:
        keys["ensure_weight_tying"] = True
    return dict(sorted(keys.items()))


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
                expected=f"{key}={understood!r}: this version of jaxtune reads no other.",
                fix="Merge that adapter with peft first, or train one without that setting.",
            )
    how = peft.get("init_lora_weights", True)
    if how not in PLAIN_INITS and how != PISSA:
        raise AdapterError(
            f"{source} was initialised by {how!r}, which changed the base's weights too, in a way that is not in the "
            "adapter.",
            expected='an adapter that is all that was changed, or "pissa", whose change follows from the base.',
            fix="Convert it to plain LoRA with peft's save_pretrained(path_initial_model_for_weight_conversion=...).",
        )
    targets = peft.get("target_modules")
    if not targets:
        raise AdapterError(
            f"{source} names no target_modules.",
            expected="the modules that the adapter belongs to.",
            fix="Save the adapter again with peft, which writes them.",
        )
    whole = tuple(name.rpartition(".")[2] for name in peft.get("modules_to_save") or ())
    return LoraConfig(
        r=peft.get("r", 8),
        lora_alpha=peft.get("lora_alpha", 8),
        init_lora_weights=PISSA if how == PISSA else LOFTQ if peft.get("loftq_config") else True,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        modules_to_save=whole,
        **{name: peft[name] for name in READ - _SPECIAL if peft.get(name) is not None},
    )


_SPECIAL = {"init_lora_weights", "lora_alpha", "modules_to_save", "r", "target_modules"}


def to_tensors(
    adapter: Tree, config: LoraConfig, module_names: ModuleNames
) -> Iterator[tuple[str, np.ndarray]]:
    adapter = _on_host(adapter)
    for module, leaves in layers(adapter, config, module_names):
        for leaf, one in leaves.items():
            for name, is_turned in _places(module, leaf, config):
                yield name, np.ascontiguousarray(one.T if is_turned else one)


def _places(module: str, leaf: str, config: LoraConfig) -> Iterator[tuple[str, bool]]:
    """Where a file has a leaf of a module: each tensor's name, and whether it is turned there."""
    is_embedding = module == EMBEDDING_PATH
    yield tensor_name(module, leaf, adapted=config.targets(module)), is_embedding and leaf in _TURNED
    if is_embedding and config.ensure_weight_tying:
        yield tensor_name(HEAD_PATH, leaf), False


def from_tensors(
    tensors: dict[str, np.ndarray], config: LoraConfig, skeleton: Tree, module_names: ModuleNames, source: str
) -> Tree:
    """The inverse of `to_tensors`. Every tensor must find its module, and every targeted module its tensors: PEFT
    itself only warns, and leaves B at zero."""
    adapter: Tree = {}
    taken: set[str] = set()

    def take(module: str, leaf: str, shape: tuple[int, ...]) -> np.ndarray:
        found: list[np.ndarray] = []
        for name, is_turned in _places(module, leaf, config):
            if leaf == "bias" and name not in tensors:
                name = tensor_name(module, leaf, adapted=False)  # as older PEFT called it
            taken.add(name)
            tensor = _take(tensors, name, shape[::-1] if is_turned else shape, source)
            found.append(tensor.T if is_turned else tensor)
            if not np.array_equal(found[0], found[-1]):
                raise AdapterError(
                    f"{source} sets ensure_weight_tying=True, and {name} is not what the embedding has.",
                    expected="the same values for the embedding and for the head, which are one.",
                    fix="Save the adapter again with peft.",
                )
        return found[0]

    for path, (_, out, inn) in adaptable(skeleton):
        names = module_names(path)
        ranks = [config.rank_of(name) for name in names]
        shapes: dict[str, tuple[int, ...]] = (
            {"a": (max(ranks), inn), "b": (out, max(ranks))} if any(ranks) else {}
        )
        if shapes and config.use_dora:
            shapes["m"] = (out,)
        if path[0] == "layers" and "bias" in at(skeleton, path) and any(map(config.trains_bias, names)):
            shapes["bias"] = (out,)
        leaves = {leaf: np.zeros((len(names), *shape), np.float32) for leaf, shape in shapes.items()}
        for leaf, stacked in leaves.items():
            for i, name in enumerate(names):
                own = cut(leaf, stacked, name, config, i)  # a view
                if own is not None:
                    own[...] = take(name, leaf, own.shape)
        if leaves:
            insert(adapter, path, leaves)
    matched = bool(adapter)
    for name in config.modules_to_save:
        shape = skeleton[EMBEDDING]["weight"].shape  # a head has the same
        insert(adapter, (name, "weight"), take(module_names((name,))[0], "weight", shape))
    unused = set(tensors) - taken
    if unused or not matched:
        some = ", ".join(sorted(unused)[:3]) or "nothing"
        raise AdapterError(
            f"{source} holds {len(unused)} tensors that belong to no targeted module of this model: {some}.",
            expected=f"names such as {tensor_name('model.layers.0.self_attn.q_proj', 'a')}.",
            fix="Check that the adapter was trained on this architecture.",
        )
    return adapter


def _take(tensors: dict[str, np.ndarray], name: str, shape: tuple[int, ...], source: str) -> np.ndarray:
    tensor = tensors.get(name)
    if tensor is None:
        raise AdapterError(
            f"{source} has no tensor {name}.",
            expected="both factors for every targeted module of the model, and all else that its settings name.",
            fix="Check that the adapter was trained on this architecture, or save it again.",
        )
    if tensor.shape != shape:
        raise AdapterError(
            f"{source}: {name} has the shape {tensor.shape}.",
            expected=f"{shape}, from the model's sizes and the rank in {CONFIG_FILE}.",
            fix="Load the adapter onto the base model that it was trained on.",
        )
    return tensor.astype(np.float32)


def _on_host(adapter: Tree) -> Tree:
    return {
        name: _on_host(leaf) if isinstance(leaf, dict) else np.asarray(leaf) for name, leaf in adapter.items()
    }
