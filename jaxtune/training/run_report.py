"""report.html of a run: what is known of it when it ends, however it ends."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxtune.data.markers import Marker
from jaxtune.data.sample import IGNORED, Sample
from jaxtune.inference.generate import ends, generate
from jaxtune.log import get_logger
from jaxtune.reporting import page
from jaxtune.reporting.metrics_file import REPORT
from jaxtune.training.metrics import plain, plain_defaults

if TYPE_CHECKING:
    from jaxtune.training.running import Run

log = get_logger(__name__)

PACKAGES = ("jaxtune", "jax", "jaxlib", "flax", "optax", "transformers", "numpy")
ANSWER_TOKENS = 64
"""Of an answer that is shown, at most: what one compiled program generates."""


class Shown(NamedTuple):
    """A prompt that is answered before and after the run, and what the dataset has for an answer."""

    prompt: list[int]
    expected: list[int] | None


def shown(sample: Sample, response: Marker | None) -> Shown:
    """Up to the last part that is trained on; where all is, up to the last answer, or to the middle of plain text."""
    length = sample.num_tokens
    trained = np.append(False, sample.labels != IGNORED)
    start = max(np.flatnonzero(trained[1:] & ~trained[:-1]).tolist(), default=length)
    if start < 2:
        answers = [end for _, end in response.spans(sample.input_ids) if end < length] if response else []
        start = max(answers, default=max(1, length // 2))
    rest = sample.labels[start:].tolist()
    return Shown(sample.input_ids[:start].tolist(), rest[: rest.index(IGNORED)] if IGNORED in rest else rest)


class RunReport:
    """A context manager around a run."""

    def __init__(self, run: "Run", shown: Sequence[Shown]):
        self.run, self.shown = run, shown
        folder = run.args.output_dir
        self.path = None if folder is None else Path(folder) / REPORT
        self.started = time.perf_counter()
        self.before: list[str] = []

    def __enter__(self) -> "RunReport":
        self.before = self._answers()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.path is None:
            return
        whole = error is None and not self.run.end
        try:
            page.write(self._report(error, self._answers() if whole else []), self.path)
            log.info("%s shows the run.", self.path)
        except OSError as problem:  # of the run itself, nothing is lost
            log.warning("the report could not be written: %s", problem)

    def _answers(self) -> list[str]:
        if not self.shown:
            return []
        run = self.run
        log.info("answering %d prompts for the report ...", len(self.shown))
        params, lora = run.trained.left()
        answers = generate(
            run.model.causal_lm,
            params,
            lora,
            [each.prompt for each in self.shown],
            max_new_tokens=ANSWER_TOKENS,
            stop_ids=ends(run.model.stop_ids, run.processing_class),
        )
        return run.processing_class.batch_decode(answers)

    def _report(self, error: BaseException | None, after: list[str]) -> page.Report:
        run = self.run
        assert self.path is not None
        of_adapter = run.model.causal_lm.lora_config
        configs = {"": run.args} | ({} if of_adapter is None else {"adapter.": of_adapter})
        settings, defaults = (
            {prefix + name: value for prefix, each in configs.items() for name, value in read(each).items()}
            for read in (plain, plain_defaults)
        )
        return page.Report(
            title=run.args.run_name or self.path.parent.name or "A run",
            outcome=self._outcome(error),
            facts=self._facts(),
            history=run.state.log_history,
            settings=settings,
            changed={name: defaults[name] for name in settings if settings[name] != defaults[name]},
            machine=machine(),
            checkpoints=[] if run.keeper is None else [path.name for path in run.keeper.saved()],
            samples=[
                page.Answered(self._text(each.prompt), self._text(each.expected), *answers)
                for each, *answers in zip(self.shown, self.before, after, strict=False)
            ],
        )

    def _text(self, ids: list[int] | None) -> Any:
        return None if ids is None else self.run.processing_class.decode(ids)

    def _outcome(self, error: BaseException | None) -> str:
        state = self.run.state
        where = f"after step {state.global_step} of {state.max_steps}"
        if isinstance(error, KeyboardInterrupt) or (error is None and self.run.end):
            return f"Interrupted {where}."
        if error is not None:
            return f"Ended {where} by {type(error).__name__}: {error}"
        return "Finished." if state.global_step >= state.max_steps else f"Stopped by a callback {where}."

    def _facts(self) -> dict[str, str]:
        run, state = self.run, self.run.state
        last: Callable[[str], Any] = lambda name: next(
            (record[name] for record in reversed(state.log_history) if name in record), None
        )
        speeds = [
            record["tokens_per_second"] for record in state.log_history if "tokens_per_second" in record
        ]
        found = {
            "model": getattr(run.model, "name_or_path", None) or None,
            "trained weights": f"{sum(leaf.size for leaf in jax.tree.leaves(run.trained.state.trained)):,}",
            "steps": f"{state.global_step} of {state.max_steps}",
            "epochs": f"{state.epoch:.2f}",
            "seconds": f"{time.perf_counter() - self.started:.1f}",
            "tokens": f"{run.tally.tokens:,}",
            "tokens per second": f"{statistics.median(speeds):.0f} (median)" if speeds else None,
            **{name: _said(last(name)) for name in ("loss", "eval_loss", "reward", "mfu")},
            "peak of the device's memory": _gb(last("peak_device_bytes")),
            "best": state.best_model_checkpoint,
        }
        return {name: value for name, value in found.items() if value is not None}


def _said(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _gb(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e9:.1f} GB"


def machine() -> dict[str, str]:
    kinds = Counter(device.device_kind for device in jax.devices())
    return {
        "devices": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())),
        "host": f"{os.cpu_count()} CPUs, {platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
