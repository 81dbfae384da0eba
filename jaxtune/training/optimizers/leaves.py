"""What an optimizer has to know of a leaf of the trained tree: whether it decays, and where its matrices are."""

from collections.abc import Callable
from typing import Any

import jax

from jaxtune.models import names


def of_leaves(function: Callable[[names.Path, Any], Any], trained: Any) -> Any:
    """The function of each leaf's path and the leaf, as a tree."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(names.keys(path), leaf), trained)


def decays(trained: Any) -> Any:
    """Whether a leaf decays: all but biases and the weights of norms."""
    return of_leaves(
        lambda path, _: path[-1] != "bias" and not any("norm" in str(name) for name in path), trained
    )


def is_stack(path: names.Path, leaf: jax.Array) -> bool:
    """Whether a leaf's first axis counts weights that are apart, each of a layer of its own."""
    return path[0] == "layers" or leaf.ndim == 3


def is_matrix_of_a_layer(path: names.Path, leaf: jax.Array) -> bool:
    """Whether a leaf stacks the matrices of hidden layers, which embedding, head, biases and norms are not."""
    return path[0] == "layers" and leaf.ndim == 3
