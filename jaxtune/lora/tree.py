"""The adapter as a tree of what is trained, all float32: the skeleton of `params` with each module's own leaves.

- a linear of the layers has a [repeats, r, in] and b [repeats, out, r], stacked like the weight they belong to, and m
  [repeats, out] with DoRA. Where layers differ in rank, the smaller ones are padded with zeros, whose gradient is
  exactly zero; a layer without an adapter has rank 0;
- a bias that is trained is `bias` [repeats, out];
- embedding and head [V, M], which have no repeats, are stacks of one: a [1, r, M] and b [1, V, r] of either;
- a module that is trained whole is its `weight`, in place of the base's.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.lora.config import EMBEDDING, HEAD, LoraConfig, ModuleNames

Tree = dict[Any, Any]


def linears(skeleton: Tree, path: tuple = ()) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """Every linear inside the layers: (path of the module, shape of its weight)."""
    for name, sub in skeleton.items():
        if isinstance(sub, dict):
            weight = sub.get("weight")
            if weight is not None and path[:1] == ("layers",) and len(weight.shape) == 3:
                yield (*path, name), weight.shape
            yield from linears(sub, (*path, name))


def adaptable(skeleton: Tree) -> Iterator[tuple[tuple, tuple[int, ...]]]:
    """Every module that may have A and B: (path, [repeats, out, in] of its weight). A head that is the embedding may
    have its own."""
    yield from linears(skeleton)
    for name in (EMBEDDING, HEAD):
        yield (name,), (1, *skeleton[EMBEDDING]["weight"].shape)


def insert(tree: Tree, path: tuple, leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf


def at(tree: Tree, path: tuple) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def modules(adapter: Tree, path: tuple = ()) -> Iterator[tuple[tuple, dict[str, jax.Array]]]:
    """Every module that has something to train: (path, its leaves)."""
    if any(not isinstance(leaf, dict) for leaf in adapter.values()):
        yield path, adapter
        return
    for name, sub in adapter.items():
        yield from modules(sub, (*path, name))


def cut(leaf: str, stacked: Any, module: str, config: LoraConfig, i: int) -> Any:
    """What a layer, the i-th of a stack, has of a leaf: without its padding, and None where it has nothing."""
    rank = config.rank_of(module)
    match leaf:
        case "bias":
            return stacked[i] if config.trains_bias(module) else None
        case "a" if rank:
            return stacked[i, :rank]
        case "b" if rank:
            return stacked[i, :, :rank]
        case "m" if rank:
            return stacked[i]
    return None


def layers(
    adapter: Tree, config: LoraConfig, module_names: ModuleNames
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every module of every layer, with what it really has: (Hugging Face path, its leaves without padding)."""
    for path, leaves in modules(adapter):
        if "weight" in leaves:
            yield module_names(path)[0], leaves
            continue
        for i, module in enumerate(module_names(path)):
            own = {name: cut(name, stacked, module, config, i) for name, stacked in leaves.items()}
            if own := {name: one for name, one in own.items() if one is not None}:
                yield module, own


def of_one(stack: Tree) -> Tree:
    """What a module outside the layers has, without the axis of repeats."""
    return jax.tree.map(lambda leaf: leaf[0], stack)


def with_settings(
    adapter: Tree, config: LoraConfig, module_names: ModuleNames, dropout: jax.Array | None = None
) -> Tree:
    """The tree that the model reads: what follows from the settings beside what is trained, each [repeats].

    `scale` is of B A; `has_m` and `has_bias` say which layers do; with a key for `dropout`, each linear of each layer
    gets a key, and the share that it keeps."""
    read: Tree = {}
    for n, (path, leaves) in enumerate(modules(adapter)):
        more: dict[str, Any] = {}
        if "weight" not in leaves:
            names = module_names(path)
            per_layer = lambda values, dtype="float32": jnp.asarray(np.array(values, dtype))
            if "bias" in leaves:
                more["has_bias"] = per_layer([config.trains_bias(name) for name in names], bool)
            if "m" in leaves:
                more["has_m"] = per_layer([config.targets(name) for name in names], bool)
            if "a" in leaves:
                more["scale"] = per_layer([config.scale_of(name) for name in names])
                if dropout is not None and config.lora_dropout:
                    more["dropout"] = jax.random.split(jax.random.fold_in(dropout, n), len(names))
                    more["keep"] = jnp.full(len(names), 1 - config.lora_dropout, jnp.float32)
        insert(read, path, {**leaves, **more})
    return read


def count(adapter: Tree, config: LoraConfig, module_names: ModuleNames) -> int:
    """Trainable parameters; padding is none."""
    return sum(leaf.size for _, own in layers(adapter, config, module_names) for leaf in own.values())
