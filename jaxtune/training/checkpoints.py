"""Checkpoints of a run: `checkpoint-<step>` in its output folder, each whole or absent.

One holds the adapter as a PEFT folder, the state of the step (what is trained, the optimizer's part, the step's number;
by orbax), and trainer_state.json: where the run and its data were. Or the model and no state, for other programs alone.
Random numbers follow from the seed and the step, so nothing of them needs keeping. They are written by a thread, from a
copy on the host, while the run goes on.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax

from jaxtune.errors import CheckpointError, nearest
from jaxtune.folders import staged
from jaxtune.loading.config import RUN_FILE
from jaxtune.log import get_logger
from jaxtune.models.causal_lm import CausalLM
from jaxtune.training.step import TrainState

log = get_logger(__name__)

STATE, RUN = "state", RUN_FILE
_NAME = re.compile(r"checkpoint-(\d+)")


def fingerprint(model: CausalLM) -> str:
    """Of the architecture and the adapter's settings: what a checkpoint's arrays belong to."""
    return hashlib.sha256(repr((model.config, model.lora_config)).encode()).hexdigest()[:16]


class Checkpoints:
    """Those of a run, in `folder`; of more than `limit`, the oldest go, but never the best."""

    def __init__(self, folder: Path, limit: int | None = None, *, with_state: bool = True):
        self.folder, self.limit, self.with_state = folder, limit, with_state
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        for left_over in folder.glob(".checkpoint-*"):  # of a run that was killed while it saved
            shutil.rmtree(left_over, ignore_errors=True)

    def save(
        self,
        state: TrainState,
        run: dict[str, Any],
        save_model: Callable[[Path, TrainState], None],
        best: Path | None,
    ) -> Path:
        """Begins to write one, as soon as the one before is written. `save_model(folder, state)` writes its part of
        it for other programs."""
        self.wait()
        target = self.folder / f"checkpoint-{run['global_step']}"
        self._writing = self._thread.submit(self._write, target, jax.device_get(state), run, save_model, best)
        return target

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _write(self, target, state, run, save_model, best):
        with staged(target, marker=RUN) as stage:
            save_model(stage, state)
            if self.with_state:
                _write_state(stage / STATE, state)
            (stage / RUN).write_text(json.dumps(run | {"saved_at": time.time()}) + "\n")
        self._prune(keep={target, best})
        log.info("saved %s", target)

    def _prune(self, keep: set[Path | None]) -> None:
        there = saved(self.folder)
        surplus = 0 if self.limit is None else len(there) - self.limit
        for oldest in [each for each in there if each not in keep][: max(0, surplus)]:
            # It loses its name first: what is half removed must not look like a checkpoint.
            gone = oldest.rename(oldest.with_name(f".{oldest.name}.old"))
            shutil.rmtree(gone, ignore_errors=True)


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder in the order in which they were saved: a run that begins anew in the folder of
    an earlier one has lower numbers, and is the newer."""
    there = [
        path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name) and (path / RUN).is_file()
    ]
    return sorted(there, key=lambda path: _moment(path, "saved_at"))


def saved_by(run_began: float, folder: Path) -> list[Path]:
    """Those of the one run that began then, resumed or not."""
    return [path for path in saved(folder) if _moment(path, "run_began") == run_began]


def _is_one(path: Path) -> bool:
    """`save_state()` writes a file of that name too, alone."""
    return (path / RUN).is_file() and ((path / STATE).is_dir() or bool(_NAME.fullmatch(path.name)))


def _moment(path: Path, name: str) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads((path / RUN).read_text())[name])
    return 0.0


def find(resume_from: str | Path | Literal[True], folder: Path | None) -> Path:
    """The checkpoint that is meant: the newest of `folder` for True."""
    if resume_from is not True:
        path = Path(resume_from)
        if not _is_one(path):
            siblings = [each.name for each in saved(path.parent)]
            raise CheckpointError(
                f"resume_from_checkpoint names {path}, which is no checkpoint of a run: no {RUN} beside a {STATE}.",
                expected="a folder such as outputs/checkpoint-100, or True for the newest in output_dir.",
                fix=f"Name one that is there.{nearest(path.name, siblings)}",
            )
        return path
    there = [] if folder is None else saved(folder)
    if not there:
        raise CheckpointError(
            "resume_from_checkpoint=True, and "
            + ("there is no output_dir." if folder is None else f"{folder} holds no checkpoint."),
            expected="an output_dir with a checkpoint-<step> in it.",
            fix="Set output_dir to that of the run to go on with; or leave resume_from_checkpoint out, to begin anew.",
        )
    return there[-1]


def read_run(path: Path, model: CausalLM) -> dict[str, Any]:
    """trainer_state.json of a checkpoint of this model."""
    try:
        run = json.loads((path / RUN).read_text())
        found = run["model"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path / RUN} cannot be read: {error}.",
            expected="the file as it was written.",
            fix="Resume from another checkpoint.",
        ) from error
    if found != fingerprint(model):
        raise CheckpointError(
            f"{path} is a checkpoint of another model, or of an adapter with other settings.",
            expected="the model and the get_peft_model settings of the run that is resumed.",
            fix="Restore them; or leave resume_from_checkpoint out, to begin anew.",
        )
    return run


def read_state(path: Path, like: TrainState) -> TrainState:
    """The state of a checkpoint, where and in the form that `like` is."""
    if not (path / STATE).is_dir():
        raise CheckpointError(
            f"{path} holds no state: it was saved with save_only_model=True, or is not whole.",
            expected="a checkpoint with the state of its run.",
            fix="Resume from one that has it; or load this one with from_pretrained, and begin a new run from there.",
        )
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
    )
    try:
        with _checkpointer() as checkpointer:
            return checkpointer.restore((path / STATE).absolute(), abstract)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path / STATE} does not hold this run's state: {str(error).splitlines()[0][:200]}",
            expected="the same optim, and the folder as it was written.",
            fix="Restore the settings of that run, or resume from another checkpoint.",
        ) from error


def _write_state(path: Path, state: TrainState) -> None:
    with _checkpointer() as checkpointer:
        checkpointer.save(path.absolute(), state)


@contextlib.contextmanager
def _checkpointer() -> Iterator[Any]:
    """Orbax logs through absl, when it is imported too, which gives the root logger a handler where it has none; all of
    our lines would then be printed twice."""
    before = list(logging.root.handlers)
    try:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            yield checkpointer
    finally:
        for handler in logging.root.handlers[:]:
            if handler not in before:
                logging.root.removeHandler(handler)
