"""One rule from a leaf's place in `params` to its Hugging Face names. Loading, adapters, merging, sharding and export
all read this; nothing else knows how weights are called on disk."""

from typing import Any

from jaxtune.models.config import ModelConfig

Path = tuple[Any, ...]
"""Keys from the root: names, and two numbers after "layers"."""


def keys(path: Any) -> Path:
    """A `jax.tree_util` key path as plain keys: ("layers", 0, 0, "mlp", "up_proj", "weight")."""
    return tuple(k.key if hasattr(k, "key") else k.name if hasattr(k, "name") else k.idx for k in path)


def is_stacked(path: Path) -> bool:
    """Whether the leaf carries a leading axis of repeats."""
    return path[0] == "layers"


def layer_indices(c: ModelConfig, path: Path) -> range:
    """The layers of the model whose weights are stacked in this leaf, in order."""
    layers, period = c.segments[path[1]]
    return layers[path[2] :: period]


def hf_names(c: ModelConfig, path: Path) -> list[str]:
    """The name of each repeat of a leaf: one for what stands outside the layers. A module's path gives module names."""
    if not is_stacked(path):
        return [".".join(path if path[0] == "lm_head" else ("model", *path))]
    return [".".join(("model.layers", str(i), *path[3:])) for i in layer_indices(c, path)]
