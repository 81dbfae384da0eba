"""Learning-rate schedules by their Hugging Face names."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import nearest

Schedule = Callable[[jax.Array], jax.Array]


class Run(NamedTuple):
    rate: float
    """The highest."""
    warmup: int
    total: int

    def done(self, step: jax.Array) -> jax.Array:
        """The part of what follows the warmup that lies behind."""
        return jnp.clip((step - self.warmup) / max(1, self.total - self.warmup), 0.0, 1.0)


Factor = Callable[..., jax.Array]
"""What the highest rate is multiplied by: (step, run, **settings) -> [], of a step in float32."""


def _constant(step: jax.Array, run: Run) -> jax.Array:
    return jnp.ones_like(step)


def _linear(step: jax.Array, run: Run) -> jax.Array:
    return 1.0 - run.done(step)


def _cosine(step: jax.Array, run: Run, *, num_cycles: float = 0.5) -> jax.Array:
    return _wave(run.done(step), num_cycles)


def _cosine_with_restarts(step: jax.Array, run: Run, *, num_cycles: int = 1) -> jax.Array:
    # Whole numbers: where a cycle begins, a rounding error is the difference between the highest rate and none.
    span = max(1, run.total - run.warmup)
    within = ((step.astype(jnp.int32) - run.warmup) * num_cycles) % span
    return jnp.where(run.done(step) < 1, _wave(within.astype(jnp.float32) / span), 0.0)


def _polynomial(step: jax.Array, run: Run, *, lr_end: float = 1e-7, power: float = 1.0) -> jax.Array:
    end = lr_end / run.rate
    return (1 - end) * (1.0 - run.done(step)) ** power + end


def _inverse_sqrt(step: jax.Array, run: Run, *, timescale: int | None = None) -> jax.Array:
    scale = timescale or run.warmup or 10_000
    return jax.lax.rsqrt((jnp.maximum(step, run.warmup) - run.warmup + scale) / scale)


def _cosine_with_min_lr(
    step: jax.Array,
    run: Run,
    *,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> jax.Array:
    least = min_lr_rate if min_lr is None else min_lr / run.rate
    assert least is not None
    return _above(least, _wave(run.done(step), num_cycles))


def _warmup_stable_decay(
    step: jax.Array,
    run: Run,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> jax.Array:
    stable = run.total - run.warmup - num_decay_steps if num_stable_steps is None else num_stable_steps
    decayed = jnp.clip((step - run.warmup - stable) / max(1, num_decay_steps), 0.0, 1.0)
    falls = {"linear": 1 - decayed, "cosine": _wave(decayed, num_cycles), "1-sqrt": 1 - jnp.sqrt(decayed)}
    fall = jnp.where(decayed < 1, falls[decay_type], 0.0)
    warm = jnp.clip(step / max(1, run.warmup), 0.0, 1.0)
    rises = {"linear": warm, "cosine": 1 - _wave(warm), "1-sqrt": 1 - jnp.sqrt(1 - warm)}
    return _above(min_lr_ratio, jnp.where(step < run.warmup, rises[warmup_type], fall))


def _wave(done: jax.Array, cycles: float = 0.5) -> jax.Array:
    """From 1 down to 0 in half a cycle."""
    return 0.5 * (1.0 + jnp.cos(2 * math.pi * cycles * done))


def _above(least: float, factor: jax.Array) -> jax.Array:
    return factor * (1 - least) + least


class Setting(NamedTuple):
    """What may be said in `lr_scheduler_kwargs`."""

    is_valid: Callable[[Any], bool]
    expected: str


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (isinstance(value, float) and math.isfinite(value)) or _is_whole(value)


AMOUNT = Setting(lambda value: _is_number(value) and value >= 0, "a number of at least 0")
PART = Setting(lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
COUNT = Setting(lambda value: _is_whole(value) and value >= 1, "a whole number of at least 1")
STEPS = Setting(lambda value: _is_whole(value) and value >= 0, "a whole number of steps")
CURVE = Setting(lambda value: value in ("linear", "cosine", "1-sqrt"), "linear, cosine or 1-sqrt")


class Kind(NamedTuple):
    factor: Factor
    settings: Mapping[str, Setting] = {}
    required: tuple[str, ...] = ()
    """Settings of which exactly one has to be there,"""
    example: Mapping[str, Any] = {}
    """such as this."""


SCHEDULES = {
    "constant": Kind(_constant),
    "constant_with_warmup": Kind(_constant),
    "linear": Kind(_linear),
    "cosine": Kind(_cosine, {"num_cycles": AMOUNT}),
    "cosine_with_restarts": Kind(_cosine_with_restarts, {"num_cycles": COUNT}),
    "cosine_with_min_lr": Kind(
        _cosine_with_min_lr,
        {"num_cycles": AMOUNT, "min_lr": AMOUNT, "min_lr_rate": PART},
        required=("min_lr", "min_lr_rate"),
        example={"min_lr_rate": 0.1},
    ),
    "polynomial": Kind(_polynomial, {"lr_end": AMOUNT, "power": AMOUNT}),
    "inverse_sqrt": Kind(_inverse_sqrt, {"timescale": COUNT}),
    "warmup_stable_decay": Kind(
        _warmup_stable_decay,
        {
            "num_decay_steps": STEPS, "num_stable_steps": STEPS, "warmup_type": CURVE, "decay_type": CURVE,
            "min_lr_ratio": PART, "num_cycles": AMOUNT,
        },
        required=("num_decay_steps",),
        example={"num_decay_steps": 100},
    ),
}  # fmt: skip
NO_COMMON_WARMUP = ("constant", "warmup_stable_decay")
"""These have none, or their own; all others rise in a straight line from 0."""


def schedule(
    kind: str,
    learning_rate: float,
    warmup_steps: int,
    total_steps: int,
    settings: Mapping[str, Any] | None = None,
) -> Schedule:
    """The rate of each step, counted from 0, as transformers' schedulers give it; `settings` are their arguments."""
    run = Run(learning_rate, warmup_steps, total_steps)

    def rate(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        factor = SCHEDULES[kind].factor(step, run, **(settings or {}))
        if kind not in NO_COMMON_WARMUP and warmup_steps > 0:
            factor = jnp.where(step < warmup_steps, step / warmup_steps, factor)
        return learning_rate * factor

    return rate


def what_is_wrong(kind: str, settings: Mapping[str, Any], learning_rate: float) -> tuple[str, str] | None:
    """Of `settings` that a schedule cannot take: what was expected, and what was perhaps meant."""
    _, known, required, example = SCHEDULES[kind]
    for name, value in settings.items():
        if name not in known:
            names = f"of {', '.join(known)}" if known else "nothing: this schedule has no settings"
            return f"for {kind} {names}, not {name!r}", nearest(str(name), known)
        if not known[name].is_valid(value):
            return f"{name} as {known[name].expected}", ""
    if required and len(settings.keys() & set(required)) != 1:
        only_one = ", and not both" if len(required) > 1 else ""
        return f"for {kind} a dict with {' or '.join(required)}{only_one}", f" For example: {dict(example)}."
    if kind == "polynomial" and not settings.get("lr_end", 1e-7) < learning_rate:
        return "an lr_end (1e-7, if it is left out) below learning_rate", ""
    if "min_lr" in settings and learning_rate == 0:
        return "min_lr only with a learning_rate above 0", ""
    return None
