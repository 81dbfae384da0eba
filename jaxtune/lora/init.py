"""A fresh adapter for a model: what is trained, as it begins. Nothing of it changes the model's output, except that
`init_lora_weights=False` starts B awake.

"pissa" moves each weight's main singular directions into A and B, and leaves the base the rest: `without_principal`.
"loftq" gives A and B the main directions of what a weight lost to 4 bits; the base stays as it was packed, so that it
is the one that anybody else gets by packing the same weights.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.device_memory import on_device
from jaxtune.errors import AdapterError, nearest
from jaxtune.lora.apply import dense, row_lengths
from jaxtune.lora.config import EMBEDDING, LOFTQ, PISSA, LoraConfig, ModuleNames, matches, selects
from jaxtune.lora.tree import Tree, adaptable, at, insert, linears, modules

Original = Callable[[str], np.ndarray]
"""A module's weight as it was before it was packed, by its Hugging Face path."""


def init(
    params: Tree,
    config: LoraConfig,
    module_names: ModuleNames,
    key: jax.Array,
    original: Original | None = None,
) -> Tree:
    """The adapter for `params`, of which plain LoRA needs the shapes only.

    A is uniform as PEFT's (Kaiming, a = sqrt 5, so within 1 / sqrt(in)), that of an embedding normal, B zero. With
    "pissa", `params` are the weights before it takes its part; "loftq" asks for the `original` ones of packed
    `params`."""
    adapter: Tree = {}
    for n, (path, shape) in enumerate(adaptable(params)):
        names = module_names(path)
        ranks = [config.rank_of(name) for name in names]
        if any(ranks):
            if config.init_lora_weights in (PISSA, LOFTQ):
                ab = _stack_principals(at(params, path)["weight"], config, names, original)
            else:
                draw = _draw_for_embedding if path == (EMBEDDING,) else _draw
                ab = draw(config, shape, np.array(ranks), jax.random.fold_in(key, n))
            insert(adapter, path, ab)
    _require_all_found(adapter, params, config, module_names)
    if config.use_dora:
        for path, ab in modules(adapter):
            ab["m"] = _lengths(at(params, path)["weight"], ab, config, module_names(path))
    for path, bias in _biases(params, config, module_names):
        insert(adapter, (*path, "bias"), bias)
    for name in config.modules_to_save:
        insert(adapter, (name, "weight"), _whole(params, name))
    return adapter


def principal(weight_OI: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    """(a [rank, in], b [out, rank]) of which scale B A is the nearest to the weight, evenly shared between the two."""
    u, s, vh = jnp.linalg.svd(weight_OI.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[:rank] / scale)
    return root[:, None] * vh[:rank], u[:, :rank] * root[None, :]


def without_principal(params: Tree, config: LoraConfig, module_names: ModuleNames) -> Tree:
    """`params` as "pissa" trains beside: each targeted weight less its principal part, in the weight's own dtype."""
    rest = jax.tree.map(lambda leaf: leaf, params)
    for path, _ in linears(params):
        names = module_names(path)
        if not any(map(config.targets, names)):
            continue
        weight = at(params, path)["weight"]
        if hasattr(weight, "dequantize"):
            raise AdapterError(
                "init_lora_weights='pissa' on a packed base.",
                expected="16-bit or 32-bit weights: the rest of one would have to be quantised anew, and then neither "
                "a merge nor another program would find the same base again.",
                fix="Load the model with load_in_4bit=False, or leave init_lora_weights out.",
            )
        layers = [
            rest_of(one, config, name) if config.targets(name) else one
            for one, name in zip(weight, names, strict=True)
        ]
        insert(rest, (*path, "weight"), jnp.stack(layers))
    return rest


def rest_of(weight_OI: jax.Array, config: LoraConfig, module: str) -> jax.Array:
    """A weight less its principal part, in its own dtype."""
    scale = config.scale_of(module)
    a, b = principal(weight_OI, config.rank_of(module), scale)
    update = scale * jnp.matmul(b, a, precision="highest")
    return (weight_OI.astype(jnp.float32) - update).astype(weight_OI.dtype)


def _draw(config: LoraConfig, shape: tuple[int, ...], ranks_N: np.ndarray, key: jax.Array) -> Tree:
    repeats, out, inn = shape
    r = int(ranks_N.max())
    own_N11 = np.maximum(ranks_N, 1).astype(np.float32)[:, None, None]
    used_NR = np.arange(r) < ranks_N[:, None]
    if config.init_lora_weights == "gaussian":
        a = jax.random.normal(key, (repeats, r, inn), jnp.float32) / own_N11
    else:
        bound = 1 / math.sqrt(inn)
        a = jax.random.uniform(key, (repeats, r, inn), jnp.float32, -bound, bound)
    b = jnp.zeros((repeats, out, r), jnp.float32)
    if config.init_lora_weights is False:
        b = jax.random.uniform(jax.random.fold_in(key, 1), b.shape, jnp.float32, -1, 1)
        b = b / np.sqrt(own_N11)
    if used_NR.all():
        return {"a": a, "b": b}
    return {"a": jnp.where(used_NR[:, :, None], a, 0), "b": jnp.where(used_NR[:, None, :], b, 0)}


def _draw_for_embedding(
    config: LoraConfig, shape: tuple[int, ...], ranks_1: np.ndarray, key: jax.Array
) -> Tree:
    """Normal, as PEFT's, whatever the settings call it."""
    _, out, inn = shape
    r = int(ranks_1[0])
    b = jnp.zeros((1, out, r), jnp.float32)
    if config.init_lora_weights is False:
        b = jax.random.normal(jax.random.fold_in(key, 1), b.shape, jnp.float32)
    return {"a": jax.random.normal(key, (1, r, inn), jnp.float32), "b": b}


def _stack_principals(weight: Any, config: LoraConfig, names: list[str], original: Original | None) -> Tree:
    """{a, b} of each layer's weight, or of what it lacks to the original."""
    ranks = [config.rank_of(name) for name in names]
    _, out, inn = weight.shape
    r, a_N, b_N = max(ranks), [], []
    for i, (name, rank) in enumerate(zip(names, ranks, strict=True)):
        a, b = jnp.zeros((0, inn)), jnp.zeros((out, 0))
        if rank:
            target = dense(_repeat(weight, i))
            if config.init_lora_weights == LOFTQ:
                if original is None or not hasattr(weight, "dequantize"):
                    raise AdapterError(
                        "init_lora_weights='loftq' on a base that is not in 4 bits.",
                        expected="a packed base: the adapter begins with what packing has lost.",
                        fix="Load the model with load_in_4bit=True, or leave init_lora_weights out.",
                    )
                target = jnp.asarray(original(name), jnp.float32) - target
            a, b = principal(target, rank, config.scale_of(name))
        a_N.append(jnp.pad(a, ((0, r - rank), (0, 0))))
        b_N.append(jnp.pad(b, ((0, 0), (0, r - rank))))
    return {"a": jnp.stack(a_N), "b": jnp.stack(b_N)}


def _repeat(weight: Any, i: int) -> Any:
    """One layer's weight of a stack, packed or not."""
    return jax.tree.map(lambda leaf: leaf[i], weight)


def _lengths(weight: Any, ab: Tree, config: LoraConfig, names: list[str]) -> jax.Array:
    """m [repeats, out]: DoRA begins with the lengths that the rows have; a layer without an adapter has none."""
    rows = []
    for i, name in enumerate(names):
        one = dense(_repeat(weight, i))
        # What "pissa" moves into A and B is part of the weight already.
        scale = jnp.float32(0 if config.init_lora_weights == PISSA else config.scale_of(name))
        length = row_lengths(one, ab["a"][i], ab["b"][i], scale)
        rows.append(jnp.where(config.targets(name), length, 0))
    return jnp.stack(rows)


def _biases(
    params: Tree, config: LoraConfig, module_names: ModuleNames, path: tuple = ()
) -> Iterator[tuple[tuple, jax.Array]]:
    """Every bias that is trained, with a copy of the base's."""
    for name, sub in params.items():
        if not isinstance(sub, dict):
            continue
        here = (*path, name)
        if "bias" in sub:
            trained = config.bias == "all" or (
                path[:1] == ("layers",) and any(map(config.trains_bias, module_names(here)))
            )
            if trained and (path[:1] != ("layers",) or len(sub["weight"].shape) != 3):
                raise AdapterError(
                    f"bias={config.bias!r} on a model with a bias in {'.'.join(map(str, here))}.",
                    expected="biases of linears inside the layers only.",
                    fix="Use bias='lora_only'.",
                )
            if trained:
                trained_N1 = np.array([config.trains_bias(module) for module in module_names(here)])[:, None]
                yield here, jnp.where(trained_N1, sub["bias"].astype(jnp.float32), 0)
        yield from _biases(sub, config, module_names, here)


def _whole(params: Tree, name: str) -> jax.Array:
    """A copy of the module's weight; of a tied head, the embedding's."""
    found = on_device(params[name if name in params else EMBEDDING]["weight"])
    return jnp.array(found, jnp.float32)


def _require_all_found(adapter: Tree, params: Tree, config: LoraConfig, module_names: ModuleNames) -> None:
    """Whatever the settings name has to be there."""
    every = [name for path, _ in adaptable(params) for name in module_names(path)]
    known = sorted({path[-1] for path, _ in adaptable(params)})
    targets = config.target_modules
    idle: list[str] = []
    if isinstance(targets, tuple):
        idle = [name for name in targets or ("",) if not any(selects((name,), module) for module in every)]
    if not idle and not adapter:
        idle = [targets if isinstance(targets, str) else ", ".join(targets)]
    absent = [i for i in config.layers_to_transform or () if not any(f".{i}." in name for name in every)]
    if absent:
        raise AdapterError(
            f"layers_to_transform has layer {absent[0]}.",
            expected="layers that the model has.",
            fix="Count from 0, or use finetune_last_n_layers.",
        )
    if idle:
        raise AdapterError(
            f"target_modules={idle[0]!r} matches no linear of this model, or none that other settings leave."
            if idle[0]
            else "target_modules names no linear for an adapter.",
            expected=f"some of {', '.join(known)}; of embed_tokens and lm_head in a list, which are trained whole, "
            "besides others.",
            fix=f"Correct it, or leave it out.{nearest(idle[0], known)}",
        )
    excluded = config.exclude_modules
    for name in (excluded,) if isinstance(excluded, str) else excluded or ():
        one = name if isinstance(excluded, str) else (name,)
        if not any(selects(one, module) for module in every):
            raise AdapterError(
                f"exclude_modules has {name!r}, which matches no module.",
                expected=f"some of {', '.join(known)}.",
                fix=f"Correct it, or leave it out.{nearest(name, known)}",
            )
    adapted = [name for name in every if config.targets(name)]
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, option):
            if not any(matches(pattern, name) for name in adapted):
                raise AdapterError(
                    f"{option} has the key {pattern!r}, which matches no module with an adapter.",
                    expected=f"the end of a path such as {adapted[0]}.",
                    fix=f"Correct it, or leave it out.{nearest(pattern, known)}",
                )
