"""The record of the kernels' tests on a GPU: such a run writes it; it is brought up once the kernels have changed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import harness
from tests.kit import gpu_runs


def report(nodeid: str, *keywords: str) -> SimpleNamespace:
    return SimpleNamespace(nodeid=nodeid, keywords=dict.fromkeys(keywords, 1))


STATS = {
    "passed": [report("a", "gpu"), report("b", "gpu"), report("c")],
    "failed": [report("d", "gpu")],
    "skipped": [report("e", "gpu")],
}


def test_a_run_is_recorded_with_the_kernels_that_it_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXTUNE_RESULTS", str(tmp_path))
    path = gpu_runs.record(STATS)
    result = json.loads(path.read_text())
    assert path == tmp_path / "gpu-tests.json"
    assert [result[outcome] for outcome in gpu_runs.OUTCOMES] == [2, 1, 0, 1]
    assert result["rows"] == [{"test": "d", "outcome": "failed"}]
    assert result["kernels"] == harness.kernels()
    assert result["seed"] == gpu_runs.SEED
    assert {"device", "date", "versions"} <= result.keys()


UNREADABLE = {"error": [SimpleNamespace(nodeid="a file that could not be imported")]}


@pytest.mark.parametrize(
    "stats", [{}, {"passed": [report("c")]}, {"skipped": [report("e", "gpu")]}, UNREADABLE]
)
def test_a_run_without_a_gpu_is_none(stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXTUNE_RESULTS", str(tmp_path))
    assert gpu_runs.record(stats) is None
    assert not list(tmp_path.iterdir())


def test_nothing_is_recorded_unasked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("JAXTUNE_RESULTS", raising=False)
    assert gpu_runs.record(STATS) is None


def test_nothing_is_said_of_the_kernels_that_were_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXTUNE_RESULTS", str(tmp_path))
    gpu_runs.record(STATS)
    assert gpu_runs.staleness(tmp_path) is None


def test_other_kernels_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAXTUNE_RESULTS", str(tmp_path))
    date = json.loads(gpu_runs.record(STATS).read_text())["date"][:10]
    monkeypatch.setattr(harness, "kernels", lambda: "another")
    line = gpu_runs.staleness(tmp_path)
    assert line == f"kernels have changed since they were last checked on a GPU (gpu-tests.json, {date})"


def test_no_record_is_said(tmp_path: Path):
    assert "no run" in gpu_runs.staleness(tmp_path)


def test_the_summary_says_it(pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch):
    said = []
    monkeypatch.setattr(gpu_runs, "staleness", lambda: "kernels have changed")
    monkeypatch.setattr(gpu_runs, "record", lambda stats: None)
    (conftest,) = (p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "pytest_terminal_summary")
                   and getattr(p, "gpu_runs", None) is gpu_runs)  # fmt: skip
    conftest.pytest_terminal_summary(SimpleNamespace(stats={}, write_line=said.append))
    assert said == ["kernels have changed"]
