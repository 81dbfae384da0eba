"""A step that runs at the first of some levels of remat whose program fits the device.

Programs say themselves what they need (XLA's `memory_analysis()`), and the device what it has free; nothing is guessed.
What a level keeps for the backward pass is known before it is compiled: if that is too much already, it never is.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxtune import device_memory
from jaxtune.device_memory import gb_free, gb_needed
from jaxtune.errors import DeviceMemoryError
from jaxtune.log import get_logger
from jaxtune.models.layer_loop import Remat
from jaxtune.training.losses import MicroBatch, Tree, WatchedLoss
from jaxtune.training.remat import candidates, remat
from jaxtune.training.step import CompiledLater, Metrics, TrainState

log = get_logger(__name__)

SLACK = 0.02
"""Of the device's memory: what may be lost between allocations."""


class Size(NamedTuple):
    """Bytes."""

    device: int
    host: int = 0
    """Pinned, so that the device can read and write it."""

    def fits(self, room: "Size") -> bool:
        return self.device <= room.device and self.host <= room.host


def first_fitting(
    levels: Sequence[str],
    room: Size,
    kept: Callable[[str], int],
    needed: Callable[[str], Size],
) -> str | None:
    """The first level that fits, or None. `kept` of a level is a part of what is `needed` on the device, and quick to
    find out; `needed` compiles."""
    for level in levels:
        if kept(level) <= room.device and needed(level).fits(room):
            return level
    return None


def free_room() -> Size | None:
    """What the device and its host have free; None if the device does not say."""
    memory = device_memory.of_device(device_memory.default_device())
    if memory is None:
        return None
    host = min(device_memory.free_of_host(), _may_be_pinned())
    return Size(max(0, int(memory.free - SLACK * memory.limit)), host)


def needed_by(program: jax.stages.Compiled) -> Size:
    """Beside its arguments."""
    of: Any = program.memory_analysis()
    return Size(
        of.temp_size_in_bytes + of.output_size_in_bytes - of.alias_size_in_bytes,
        of.host_temp_size_in_bytes + of.host_output_size_in_bytes - of.host_alias_size_in_bytes,
    )


def _may_be_pinned() -> int:
    return int((1 - SLACK) * device_memory.pinned_limit())


def _held_on_host(*args: Any) -> int:
    """Bytes of a step's arguments, which are pinned already."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(args) if device_memory.is_on_host(leaf))


def kept_by(loss: WatchedLoss, trained: Tree, frozen: Tree, batch: MicroBatch) -> int:
    """Bytes that the forward pass of one micro-batch hands to the backward pass, beside the loss' arguments."""

    def pullback(trained, frozen, micro):
        return jax.vjp(
            lambda *args: loss(*args)[0],
            trained, frozen, micro,
            saveable_args=(False, False, False),
            in_nzs=(True, False, False),
        )[1]  # fmt: skip

    micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
    leaves = jax.tree.leaves(jax.eval_shape(pullback, trained, frozen, micro))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


class FittingStep:
    """A `Step` that is compiled for every shape of a batch: at the level that was asked for, or with "auto" at the
    first that fits. What does not fit raises before it runs, and names what would."""

    def __init__(
        self,
        step_at: Callable[[str], CompiledLater],
        loss_at: Callable[[Remat], WatchedLoss],
        asked: str,
        option: str = "use_gradient_checkpointing",
        room: Callable[[], Size | None] | None = None,
    ):
        """`option` is what errors call the setting that was asked for."""
        self._step_at, self._loss_at, self._asked, self._option = step_at, loss_at, asked, option
        self._room = room or free_room
        self._programs: dict[Any, tuple[str, jax.stages.Compiled]] = {}
        self.level: str | None = None
        """That of the program that ran last."""

    def prepare(self, state: TrainState, frozen: Tree, batch: MicroBatch) -> tuple[str, jax.stages.Compiled]:
        """The level and the program for arguments of these shapes, compiled unless it was."""
        leaves, structure = jax.tree.flatten((state, batch))
        key = structure, tuple((x.shape, x.dtype, getattr(x, "sharding", None)) for x in leaves)
        if key not in self._programs:
            self._programs[key] = self._fitting(state, frozen, batch)
        return self._programs[key]

    def __call__(self, state: TrainState, frozen: Tree, batch: MicroBatch) -> tuple[TrainState, Metrics]:
        self.level, program = self.prepare(state, frozen, batch)
        try:
            return program(state, frozen, batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise self._ran_out(self.level, needed_by(program)) from error

    def _ran_out(self, level: str, size: Size) -> DeviceMemoryError:
        """What fits by its size may not find a piece as large, or another process takes it."""
        smaller = next(iter(candidates(level, memory_is_known=True)[1]), None)
        room = self._room()
        return DeviceMemoryError(
            f"The device ran out of memory in a step at gradient checkpointing {level!r}, which takes {_text(size)}"
            + (f"; free are {_text(room, gb_free)}." if room else "."),
            expected="that much in one piece.",
            fix=f"Set {self._option}={smaller!r}." if smaller else f"{_batches_divided_by(2)}.",
        )

    def _fitting(self, state: TrainState, frozen: Tree, batch: MicroBatch) -> tuple[str, jax.stages.Compiled]:
        room = self._room()
        held = _held_on_host(state, frozen)
        if room is not None:
            room = room._replace(host=max(0, min(room.host, _may_be_pinned() - held)))
        levels, smaller = candidates(self._asked, memory_is_known=room is not None)

        @functools.cache
        def program(level):
            return self._step_at(level).lower(state, frozen, batch).compile()

        @functools.cache
        def kept(level):
            how = remat(level)
            # A loop keeps the same, and is traced once for all layers.
            return 0 if how.on_host else kept_by(
                self._loss_at(how._replace(unrolled=False)), state.trained, frozen, batch
            )  # fmt: skip

        if room is None:
            return levels[0], program(levels[0])
        needed = functools.cache(lambda level: needed_by(program(level)))
        level = first_fitting(levels, room, kept, needed)
        if level is not None:
            log.info("gradient checkpointing %r: the step takes %s", level, _text(needed(level)))
            return level, program(level)
        tried = levels[-1]
        at_least = kept(tried) > room.device
        size = Size(kept(tried)) if at_least else needed(tried)
        raise DeviceMemoryError(
            f"A step of {' x '.join(map(str, batch['tokens'].shape))} tokens at gradient checkpointing {tried!r} takes "
            f"{'at least ' if at_least else ''}{_text(size)}.",
            expected=f"at most the {_text(room, gb_free)} that are free.",
            fix=self._which_level_fits(room, smaller, kept, needed)
            or _which_limit_fits(size, room, held)
            or self._which_batch_fits(room, (*levels, *smaller)[-1], state, frozen, batch)
            or "Nothing that was tried fits beside the weights: take a larger device, or a smaller model.",
        )

    def _which_level_fits(
        self, room: Size, levels: Sequence[str], kept: Callable[[str], int], needed: Callable[[str], Size]
    ) -> str | None:
        level = first_fitting(levels, room, kept, needed)
        return level and f"Set {self._option}={level!r}, which takes {_text(needed(level))}."

    def _which_batch_fits(
        self, room: Size, level: str, state: TrainState, frozen: Tree, batch: MicroBatch
    ) -> str | None:
        for k in (2, 4, 8, 16):
            size = needed_by(self._step_at(level).lower(state, frozen, _fewer_tokens(batch, k)).compile())
            if size.fits(room):
                return (
                    f"{_batches_divided_by(k)}, or make samples that much shorter; "
                    f"with {self._option}={level!r} that takes {_text(size)}."
                )
        return None


def _which_limit_fits(size: Size, room: Size, held: int) -> str | None:
    """If the host has the memory, and XLA would not pin it."""
    if size.device > room.device or not room.host < size.host <= device_memory.free_of_host():
        return None
    return device_memory.raise_limit(int((held + size.host) / (1 - SLACK)))


def _batches_divided_by(k: int) -> str:
    return f"Divide per_device_train_batch_size by {k} and multiply gradient_accumulation_steps by {k}"


def _fewer_tokens(batch: MicroBatch, k: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of k times the micro-batches with a k-th of the tokens each: fewer rows, or else a shorter one."""
    A, R, L = batch["tokens"].shape
    rows, length = (math.ceil(R / k), L) if k <= R else (1, math.ceil(R * L / k))

    def smaller(x):
        # [A, R, L] for each token, [A, G, M] for pieces, [A] for each micro-batch.
        if x.ndim != 3:
            shape = x.shape[1:]
        elif x.shape[1:] == (R, L):
            shape = rows, length
        else:
            shape = rows if x.shape[2] == 1 else _groups(rows * length, x.shape[1] // k), x.shape[2]
        return jax.ShapeDtypeStruct((A * k, *shape), x.dtype)

    return {name: smaller(x) for name, x in batch.items()}


def _groups(tokens: int, at_most: int) -> int:
    return next(groups for groups in range(max(1, at_most), 0, -1) if tokens % groups == 0)


def _text(size: Size, gb: Callable[[int], str] = gb_needed) -> str:
    host = f" and {gb(size.host)} of the host's" if size.host else ""
    return f"{gb(size.device)} of the device's memory{host}"
