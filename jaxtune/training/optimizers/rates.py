"""Leaves that learn at a rate of their own, as in a parameter group of torch: schedule and weight decay go with it."""

from typing import Any

import jax
import optax

from jaxtune.errors import OptionError
from jaxtune.lora.config import EMBEDDING, HEAD
from jaxtune.models import names
from jaxtune.training.optimizers.leaves import of_leaves

SAME = optax.identity()
"""Every leaf learns at the schedule's rate."""


def own_rates(embedding: float | None, loraplus: float | None) -> optax.GradientTransformation:
    """Directions times what a leaf's rate is of the schedule's: `embedding` for all of embedding and head, else
    `loraplus` for the B of an adapter; None is the same rate. Stands behind weight decay, before the rate."""
    if embedding is None and loraplus is None:
        return SAME

    def ratio(path: names.Path, _: Any) -> float:
        if embedding is not None and _is_end(path):
            return embedding
        return loraplus if loraplus is not None and path[-1] == "b" else 1.0

    def init(trained: Any) -> optax.EmptyState:
        paths = [names.keys(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
        if embedding is not None and not any(map(_is_end, paths)):
            raise OptionError(
                "embedding_learning_rate is given, but neither the embedding nor the head is trained.",
                expected="a model that trains one of them.",
                fix="Add embed_tokens or lm_head to get_peft_model's target_modules, or leave the option out.",
            )
        if loraplus is not None and not any(path[-1] == "b" for path in paths):
            raise OptionError(
                "loraplus_lr_ratio is given, but no B of an adapter is trained.",
                expected="a model with a LoRA adapter.",
                fix="Leave the option out of full fine-tuning.",
            )
        return optax.EmptyState()

    def update(directions: Any, state: optax.EmptyState, trained: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda d, by: d * by, directions, of_leaves(ratio, directions)), state

    return optax.GradientTransformation(init, update)


def _is_end(path: names.Path) -> bool:
    return path[0] in (EMBEDDING, HEAD)
