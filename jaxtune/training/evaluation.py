"""The loss of samples that are not trained on: the mean over all their trained tokens, as in training."""

import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

import jax

from jaxtune.data.batches import BatchStream
from jaxtune.data.sample import Item
from jaxtune.models.causal_lm import CausalLM, Lora, Params
from jaxtune.training.loop import Record
from jaxtune.training.losses import MicroBatch, next_token_loss, trained_tokens


def evaluate(
    model: CausalLM,
    params: Params,
    lora: Lora | None,
    samples: Sequence[Item],
    batch_size: int,
    prefix: str = "eval",
) -> Record:
    """`<prefix>_loss`, and how fast it came."""
    started = time.perf_counter()
    stream = BatchStream(samples, batch_size, shuffle=False)
    sums = [_sums(model, lora, params, batch) for batch, _ in islice(stream, stream.steps_per_epoch)]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    runtime = time.perf_counter() - started
    return {
        f"{prefix}_loss": float(sum(map(float, losses)) / max(1, sum(map(int, tokens)))),
        f"{prefix}_runtime": runtime,
        f"{prefix}_samples_per_second": sum(len(item.parts) for item in samples) / runtime,
        f"{prefix}_steps_per_second": stream.steps_per_epoch / runtime,
    }


def metric_names(prefixes: Iterable[str]) -> list[str]:
    """What `evaluate` says of each."""
    said = ("loss", "runtime", "samples_per_second", "steps_per_second")
    return [f"{prefix}_{name}" for prefix in prefixes for name in said]


def evaluate_all(
    model: CausalLM, params: Params, lora: Lora | None, sets: Mapping[str, Sequence[Item]], batch_size: int
) -> Record:
    """The metrics of several sets, by their prefixes."""
    metrics: Record = {}
    for prefix, samples in sets.items():
        metrics |= evaluate(model, params, lora, samples, batch_size, prefix)
    return metrics


@functools.partial(jax.jit, static_argnums=0)
def _sums(
    model: CausalLM, lora: Lora | None, params: Params, batch: MicroBatch
) -> tuple[jax.Array, jax.Array]:
    """The loss' sum over a step's only micro-batch, and its trained tokens."""
    only = jax.tree.map(lambda x: x[0], batch)
    return next_token_loss(model)(lora, params, only), trained_tokens(only)
