"""Rollouts: completions sampled from the very arrays that are being trained, and laid out as a step's batch.

Shapes: S completions, [A, R, L] micro-batches of rows of tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxtune.data.batches import Batch, lay_out
from jaxtune.data.layout import MENU_SIZE, Limits, Shape, bucket, cheapest_fit, spread
from jaxtune.data.pieces import Packing
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.inference.generate import generate
from jaxtune.models.causal_lm import CausalLM, Lora, Params


class Rollout(NamedTuple):
    """Completions, those of one prompt side by side."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """Each with its stop token, if it got to one."""
    finished_S: np.ndarray
    """False for completions that were cut off."""

    @property
    def lengths_S(self) -> np.ndarray:
        """Tokens of each completion."""
        return np.array([len(ids) for ids in self.completion_ids])

    @property
    def num_tokens(self) -> int:
        """Of prompts and completions."""
        return sum(map(len, self.prompt_ids)) + int(self.lengths_S.sum())


def roll_out(
    model: CausalLM,
    params: Params,
    lora: Lora | None,
    prompts: Sequence[list[int]],
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    stop_ids: Sequence[int],
    key: jax.Array,
) -> Rollout:
    """`num_generations` completions of every prompt."""
    repeated = [prompt for prompt in prompts for _ in range(num_generations)]
    completions = generate(
        model,
        params,
        lora,
        repeated,
        max_new_tokens=max_completion_length,
        stop_ids=stop_ids,
        temperature=temperature,
        key=key,
    )
    return Rollout(repeated, completions, np.array([ids[-1] in stop_ids for ids in completions]))


def shapes(limits: Limits) -> tuple[Shape, ...]:
    """The shapes that a run's batches may have, before it is known how long completions will be: fewer micro-batches,
    then shorter rows. Each is compiled when a rollout first needs it; the largest holds every rollout."""
    largest = limits.largest
    counts = (
        np.linspace(largest.micro_batches, 1, min(largest.micro_batches, MENU_SIZE - 1)).round().astype(int)
    )
    menu = [largest._replace(micro_batches=int(n)) for n in counts]
    while len(menu) < MENU_SIZE and menu[-1].length > 64:
        menu.append(menu[-1]._replace(length=bucket(menu[-1].length // 2)))
    return tuple(menu)


def lay_out_rollout(
    rollout: Rollout,
    trained_S: np.ndarray,
    menu: Sequence[Shape],
    **values_S: np.ndarray,
) -> Batch:
    """A step's batch: completions are labels, prompts context. Completions that are not to be trained have no labels.
    Each of `values_S` becomes an array of the tokens' shape: its completion's value at every label, 0 elsewhere."""
    samples = [
        Sample(
            np.array(prompt + completion, np.int32),
            np.array(
                [IGNORED] * len(prompt) + (completion if trained else [IGNORED] * len(completion)), np.int32
            ),
        )
        for prompt, completion, trained in zip(
            rollout.prompt_ids, rollout.completion_ids, trained_S, strict=True
        )
    ]
    lengths = [len(sample.input_ids) for sample in samples]
    shape = cheapest_fit(lengths, menu)
    rows = spread(lengths, shape.all_rows)  # as `lay_out` places them
    # However long a completion became, the program is the same.
    packing = Packing(longest=shape.length, number=0) if any(len(row) > 1 for row in rows) else None
    batch = lay_out(samples, shape, packing)
    member_of = np.zeros((shape.all_rows, 1 + max(map(len, rows))), np.int32)
    for row, members in enumerate(rows):
        member_of[row, 1 : 1 + len(members)] = members
    segments = batch["segment_ids"].reshape(shape.all_rows, -1)
    completion = member_of[np.arange(shape.all_rows)[:, None], segments].reshape(shape)
    for name, value_S in values_S.items():
        batch[name] = np.where(batch["labels"] == IGNORED, 0, value_S[completion]).astype(np.float32)
    return batch
