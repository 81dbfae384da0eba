"""The one training loop: batches in, steps dispatched, metrics read one step late. SFT and RL differ in their batches
and their loss, not here. The host never waits for the step that it has just dispatched."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from jaxtune.errors import DivergenceError
from jaxtune.log import get_logger
from jaxtune.training.losses import Tree
from jaxtune.training.step import Step, TrainState

log = get_logger(__name__)

Record = dict[str, float]
"""One step's numbers: the step's metrics, the batch's own facts, `step`, `step_time_sec`, and `compile_seconds` (which
the step's time does not include) where its shape was new. Of a step that was skipped it has the counts alone."""


def run(
    step: Step,
    state: TrainState,
    frozen: Tree,
    batches: Iterable[tuple[Mapping[str, Any], Mapping[str, float]]],
    on_record: Callable[[Record], Any],
    on_state: Callable[[TrainState], Any] = lambda state: None,
    after_step: Callable[[Mapping[str, Any], Callable[[], None]], bool] = lambda facts, settle: True,
    skips: int = 0,
    prepare: Callable[[TrainState, Tree, Mapping[str, Any]], Any] = lambda *_: None,
) -> TrainState:
    """Runs one step for every (batch, facts). `on_record` sees each step's numbers once the next one is under way;
    `on_state` sees the state after each step, which the next one consumes. `after_step` says whether to go on; it is
    given the batch's facts, and `settle`, by which it has the step's numbers at once, and its own time is not the next
    step's. Of the facts, `sample_ids` are for errors alone. Up to `skips` steps in a row may have a loss or a gradient
    that is not finite; `step` has then to leave the state as it was. `prepare` compiles the step for its arguments."""
    pending: tuple[int, dict[str, Any], Future[float], Mapping[str, Any]] | None = None
    shapes: set[tuple] = set()
    skipped = 0  # in a row
    clock = time.perf_counter()

    def settle() -> None:
        nonlocal clock, pending, skipped
        if pending is None:
            return
        number, metrics, done, facts = pending
        pending = None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        now = done.result()
        sample_ids = facts.get("sample_ids")
        facts = {name: fact for name, fact in facts.items() if name != "sample_ids"}
        is_finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        skipped = 0 if is_finite else skipped + 1
        found = (
            f"At step {number} the loss is {values['loss']} and the gradient's norm {values['grad_norm']}"
            + (f"; its samples are {', '.join(map(str, sample_ids))}." if sample_ids else ".")
        )
        if skipped > skips:
            raise DivergenceError(
                found + (f" So it was in each of the {skips} steps before." if skips else ""),
                expected="finite numbers.",
                fix="Lower learning_rate, keep max_grad_norm at 1.0, and look at the samples of that step. A model "
                "in float16 may need dtype='bfloat16': float16 ends at 65504.",
            )
        if skipped:
            log.warning("%s It is skipped: %d in a row, of at most %d.", found, skipped, skips)
            values = {name: value for name, value in values.items() if isinstance(value, int)}
        on_record({"step": number, **values, **facts, "step_time_sec": now - clock})
        clock = now

    # Dispatching a program with loops takes until it nearly ends: when the one before it did, someone else has to see.
    with ThreadPoolExecutor(1, "jaxtune-clock") as watcher:
        for number, (batch, facts) in enumerate(batches, start=int(state.step) + 1):
            shape = batch["tokens"].shape
            is_new = (program := tuple((name, x.shape) for name, x in sorted(batch.items()))) not in shapes
            if is_new:
                # So that the time of compiling is this step's, and the step before it is shown at once.
                settle()
                shapes.add(program)
                log.info("compiling the step for %d x %d x %d tokens ...", *shape)
                begun = time.perf_counter()
                prepare(state, frozen, batch)
                compiled = time.perf_counter() - begun
                clock += compiled
                facts = {**facts, "compile_seconds": compiled}
            state, metrics = step(state, frozen, batch)
            on_state(state)
            settle()
            pending = (number, metrics, watcher.submit(_when_done, metrics), facts)
            before = clock
            goes_on = after_step(facts, settle)
            if clock != before:  # it settled, and what it did then is not the next step's
                clock = time.perf_counter()
            if not goes_on:
                break
        settle()
    return state


def _when_done(metrics: Any) -> float:
    jax.block_until_ready(metrics)
    return time.perf_counter()
