"""A model's arrays by their Hugging Face names, each layer's for itself, fetched when it is wanted."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax

from jaxtune.lora.config import EMBEDDING, HEAD
from jaxtune.models import names
from jaxtune.models.causal_lm import Params
from jaxtune.models.config import ModelConfig
from jaxtune.quant import PackedArray


class Weight(NamedTuple):
    shape: tuple[int, ...]
    leaf: Any
    """The leaf of `params` that it is, or is a layer of."""
    fetch: Callable[[], Any]
    """Gives the array itself, packed if the leaf is."""


def weights(config: ModelConfig, params: Params) -> Iterator[tuple[str, Weight]]:
    """Everything in `params`, or in some parts of it."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda x: isinstance(x, PackedArray))
    for place, leaf in leaves:
        path = names.keys(place)
        for i, name in enumerate(names.hf_names(config, path)):
            if names.is_stacked(path):
                yield name, Weight(leaf.shape[1:], leaf, functools.partial(_layer, leaf, i))
            else:
                yield name, Weight(leaf.shape, leaf, functools.partial(_itself, leaf))


def own_weights(config: ModelConfig, params: Params, parts: Iterable[str]) -> dict[str, Weight]:
    """The weights of some parts of a model, which a checkpoint holds otherwise. Some checkpoints store a tied head, by
    a name of its own."""
    own = dict(weights(config, {part: params[part] for part in parts}))
    if config.tie_word_embeddings and EMBEDDING in parts:
        own[f"{HEAD}.weight"] = own[f"model.{EMBEDDING}.weight"]
    return own


def _layer(stack: Any, i: int) -> Any:
    return jax.tree.map(lambda array: array[i], stack)


def _itself(leaf: Any) -> Any:
    return leaf
