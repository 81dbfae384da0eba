"""Optimizers by their Hugging Face names, as transformers' trainer sets them up."""

import functools
from typing import NamedTuple

import jax
import optax

from jaxtune.training.optimizers.adafactor import scale_by_adafactor
from jaxtune.training.optimizers.adam_8bit import scale_by_adam_8bit
from jaxtune.training.optimizers.arguments import arguments
from jaxtune.training.optimizers.leaves import decays, is_matrix_of_a_layer, of_leaves
from jaxtune.training.optimizers.lion_8bit import scale_by_lion_8bit
from jaxtune.training.optimizers.muon import scale_by_muon
from jaxtune.training.optimizers.rates import SAME
from jaxtune.training.optimizers.schedule_free import schedule_free
from jaxtune.training.schedules import Schedule


class Kind(NamedTuple):
    family: str
    bits: int = 32
    """In which it keeps its moments."""


OPTIMIZERS = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), Kind("adamw", 8)),
    **dict.fromkeys(
        ("adamw", "adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adamw_hf"), Kind("adamw")
    ),
    "lion_8bit": Kind("lion", 8),
    "lion_32bit": Kind("lion"),
    **{name: Kind(name) for name in ("adafactor", "muon", "rmsprop", "schedule_free_adamw", "sgd")},
}
PAGED = {
    "paged_adamw_8bit": "adamw_8bit",
    "paged_adamw_32bit": "adamw_torch",
    "paged_lion_8bit": "lion_8bit",
    "paged_lion_32bit": "lion_32bit",
}
"""Names of optimizers that page their moments elsewhere, and of those that they are here."""


def make_optimizer(
    name: str,
    rate: Schedule,
    *,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    warmup_steps: int = 0,
    optim_args: str | None = None,
    rates: optax.GradientTransformation = SAME,
) -> optax.GradientTransformation:
    """What does not decay is what transformers' trainer leaves alone. sgd and rmsprop add the decay to the gradient, as
    torch does, all others to the step. `warmup_steps` are for schedule_free_adamw, which has a warmup of its own;
    `optim_args` is what only one optimizer has (see `arguments`); `rates` says what learns at another rate (see
    `own_rates`)."""
    kind = OPTIMIZERS[PAGED.get(name, name)]
    more = arguments(kind.family, optim_args)
    decay = optax.add_decayed_weights(weight_decay, mask=decays)
    adam = optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon)
    match kind.family, kind.bits:
        case "adamw", 8:
            direction = optax.chain(scale_by_adam_8bit(beta1=beta1, beta2=beta2, epsilon=epsilon), decay)
        case "adamw", _:
            direction = optax.chain(adam, decay)
        case "lion", 8:
            direction = optax.chain(scale_by_lion_8bit(beta1=beta1, beta2=beta2), decay)
        case "lion", _:
            direction = optax.chain(optax.scale_by_lion(b1=beta1, b2=beta2), decay)
        case "adafactor", _:
            direction = optax.chain(scale_by_adafactor(), decay)
        case "muon", _:
            matrices = lambda trained: of_leaves(is_matrix_of_a_layer, trained)
            direction = optax.chain(optax.partition({True: scale_by_muon(), False: adam}, matrices), decay)
        case "sgd", _:
            direction = optax.chain(decay, _momentum(more["momentum"], more["nesterov"]))
        case "rmsprop", _:
            by = optax.scale_by_stddev if more["centered"] else optax.scale_by_rms
            scale = by(decay=more["alpha"], eps=more["eps"], eps_in_sqrt=False)
            direction = optax.chain(decay, scale, _momentum(more["momentum"]))
        case _:
            scale = optax.scale_by_rms(decay=beta2, eps=epsilon, eps_in_sqrt=False, bias_correction=True)
            direction = optax.chain(scale, decay, rates)
            return any_promotion(schedule_free(direction, rate, beta1, warmup_steps))
    return any_promotion(optax.chain(direction, rates, optax.scale_by_learning_rate(rate)))


def _momentum(decay: float, nesterov: bool = False) -> optax.GradientTransformation:
    """torch's: a sum of directions that fade, not their mean."""
    return optax.trace(decay, nesterov) if decay else optax.identity()


def adamw(
    rate: Schedule, *, beta1: float, beta2: float, epsilon: float, weight_decay: float, bits: int = 32
) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, as torch computes it; in 8 bits its moments are kept as bitsandbytes does."""
    name = "adamw_8bit" if bits == 8 else "adamw_torch"
    return make_optimizer(name, rate, beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=weight_decay)


def any_promotion(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer under JAX's standard dtype promotion: optax mixes its int32 step count with floats, which
    users who run with strict promotion could not."""

    def relaxed(function):
        @functools.wraps(function)
        def call(*args):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args)

        return call

    return optax.GradientTransformation(relaxed(optimizer.init), relaxed(optimizer.update))
