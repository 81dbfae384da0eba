"""The adapter as a tree: the skeleton of `params` with each target's weight replaced by {a, b} and the rest dropped.

a is [repeats, r, in], b is [repeats, out, r], both float32, stacked like the weights they belong to.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.errors import AdapterError, nearest
from jaxtune.lora.config import LoraConfig

Tree = dict[Any, Any]


def linears(skeleton: Tree, path: tuple = ()) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """Every linear inside the layers: (path of the module, shape of its weight)."""
    for name, sub in skeleton.items():
        if isinstance(sub, dict):
            weight = sub.get("weight")
            if weight is not None and path[:1] == ("layers",) and len(weight.shape) == 3:
                yield (*path, name), weight.shape
            yield from linears(sub, (*path, name))


def init(
    skeleton: Tree, config: LoraConfig, module_names: Callable[[tuple], list[str]], key: jax.Array
) -> Tree:
    """A fresh adapter: A uniform as PEFT's (Kaiming, a = sqrt 5, so within 1 / sqrt(in)), B zero, so it starts silent.

    `module_names(path)` gives the Hugging Face path of each repeat of a stacked module."""
    adapter: Tree = {}
    for n, (path, (repeats, out, inn)) in enumerate(linears(skeleton)):
        hits = [config.targets(name) for name in module_names(path)]
        if not any(hits):
            continue
        if not all(hits):
            raise AdapterError(
                f"target_modules={config.target_modules!r} selects {'.'.join(map(str, path[3:]))} in some layers only.",
                expected="a selection that is the same in every layer.",
                fix="Name modules without their layer's number.",
            )
        bound = 1 / math.sqrt(inn)
        a = jax.random.uniform(
            jax.random.fold_in(key, n), (repeats, config.r, inn), jnp.float32, -bound, bound
        )
        insert(adapter, path, {"a": a, "b": jnp.zeros((repeats, out, config.r), jnp.float32)})
    targets = (
        (config.target_modules,) if isinstance(config.target_modules, str) else config.target_modules or ("",)
    )
    found = {path[-1] for path, _ in modules(adapter)}
    idle = [
        name for name in targets if not adapter or (len(targets) > 1 and name.split(".")[-1] not in found)
    ]
    if idle:
        known = sorted({path[-1] for path, _ in linears(skeleton)})
        raise AdapterError(
            f"target_modules={idle[0]!r} matches no linear of this model's layers.",
            expected=f"some of {', '.join(known)}.",
            fix=f"Correct it, or leave it out.{nearest(idle[0], known)}",
        )
    return adapter


def insert(tree: Tree, path: tuple, leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def modules(adapter: Tree, path: tuple = ()) -> Iterator[tuple[tuple, dict[str, jax.Array]]]:
    """Every adapted module: (path, {a, b})."""
    if "a" in adapter:
        yield path, adapter
        return
    for name, sub in adapter.items():
        yield from modules(sub, (*path, name))


def with_scales(adapter: Tree, config: LoraConfig) -> Tree:
    """The tree that the model reads: {a, b, scale}. The scale comes from the settings, never from what is trained."""
    scaled: Tree = {}
    for path, ab in modules(adapter):
        insert(scaled, path, {**ab, "scale": jnp.full(ab["a"].shape[:1], config.scale, jnp.float32)})
    return scaled


def count(adapter: Tree) -> int:
    """Trainable parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(adapter))
