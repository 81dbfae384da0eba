"""Optimizers as gradient transformations, by their Hugging Face names."""

from jaxtune.training.optimizers.arguments import arguments
from jaxtune.training.optimizers.by_name import OPTIMIZERS, PAGED, adamw, any_promotion, make_optimizer
from jaxtune.training.optimizers.offloading import offloaded
from jaxtune.training.optimizers.rates import own_rates
from jaxtune.training.optimizers.schedule_free import averaged
from jaxtune.training.optimizers.skipping import skipping

__all__ = [
    "OPTIMIZERS", "PAGED", "adamw", "any_promotion", "arguments", "averaged", "make_optimizer", "offloaded",
    "own_rates", "skipping",
]  # fmt: skip
