"""What is known of the kernels on a GPU: the test run that is recorded, and whether it was of these sources."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import harness

NAME = "gpu-tests"
OUTCOMES = ("passed", "failed", "error", "skipped")
SEED = int(os.environ["JAXTUNE_TEST_SEED"])
"""Of the random inputs of this run; conftest.py draws one where none is given."""


def staleness(folder: Path = harness.RESULTS) -> str | None:
    """What there is to say if the recorded run does not speak for the kernels as they are."""
    path = folder / f"{NAME}.json"
    if not path.exists():
        return f"no run of the kernels' tests on a GPU is recorded ({path.name})"
    recorded = json.loads(path.read_text())
    if recorded["kernels"] == harness.kernels():
        return None
    return (
        f"kernels have changed since they were last checked on a GPU ({path.name}, {recorded['date'][:10]})"
    )


def record(reports: Mapping[str, Sequence[Any]]) -> Path | None:
    """Writes down a run of the GPU's tests, if JAXTUNE_RESULTS says where. `reports` are pytest's, by outcome."""
    # A file that could not be imported has a report without keywords.
    of_gpu = {o: [r for r in reports.get(o, ()) if "gpu" in getattr(r, "keywords", ())] for o in OUTCOMES}
    ran = sum(len(of_gpu[outcome]) for outcome in OUTCOMES if outcome != "skipped")
    if not ran or not os.environ.get("JAXTUNE_RESULTS"):
        return None
    rows = [{"test": r.nodeid, "outcome": o} for o in ("failed", "error") for r in of_gpu[o]]
    return harness.record(NAME, rows, seed=SEED, **{o: len(of_gpu[o]) for o in OUTCOMES})
