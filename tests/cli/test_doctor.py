"""`jaxtune doctor`: the facts come from this machine, the judgements from reports made up here."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtune.cli import doctor
from jaxtune.cli import main as command_line
from jaxtune.cli.doctor import Device, GiB, Misfit, NvidiaGPU, Report, advice, problems
from jaxtune.errors import ConfigError
from jaxtune.version import __version__

H200 = NvidiaGPU(name="NVIDIA H200", driver="580.159.04", memory_total=140 * GiB, memory_free=139 * GiB)

HEALTHY = Report(
    python="3.12.3",
    system="Linux 6.18 x86_64",
    versions={"jax": "0.11.2", "jax-cuda12-plugin": None},
    misfits=[],
    backend="gpu",
    backend_error=None,
    devices=[
        Device(id=0, kind="NVIDIA H200", compute_capability="9.0", memory_limit=133 * GiB, memory_in_use=GiB)
    ],
    nvidia=[H200],
    nvidia_present=True,
    host_memory_total=128 * GiB,
    host_memory_available=100 * GiB,
    compilation_cache=None,
    implementations={"attention": "xla"},
)


def changed(**fields) -> Report:
    return dataclasses.replace(HEALTHY, **fields)


def test_healthy_machine_has_no_findings():
    assert problems(HEALTHY) == advice(HEALTHY) == []


def test_gpu_that_jax_does_not_use_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    unused = changed(backend="cpu", devices=[Device(id=0, kind="cpu")])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert "jaxtune[cuda13]" in problems(unused)[0]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS=cpu asks for it" in problems(unused)[0]


def test_machine_without_gpu_has_no_problem():
    plain = changed(backend="cpu", devices=[Device(id=0, kind="cpu")], nvidia=[], nvidia_present=False)
    assert problems(plain) == []


def test_backend_that_does_not_start_is_a_problem():
    assert "no CUDA device" in problems(changed(backend=None, backend_error="no CUDA device", devices=[]))[0]


def test_version_outside_the_tested_range_is_a_problem():
    old = changed(misfits=[Misfit(package="flax", installed="0.13.0", tested="<0.13,>=0.12.10")])
    assert problems(old) == ["flax 0.13.0 is outside the tested range: pip install 'flax<0.13,>=0.12.10'"]


def test_occupied_gpu_is_advice():
    busy = changed(nvidia=[dataclasses.replace(H200, memory_free=20 * GiB)])
    assert "other processes hold 120.0 GiB of 140.0 GiB on GPU 0" in advice(busy)[0]
    assert problems(busy) == []


def test_small_share_of_memory_for_xla_is_advice():
    small = changed(devices=[dataclasses.replace(HEALTHY.devices[0], memory_limit=105 * GiB)])
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in advice(small)[0]


def test_ranges_are_those_of_our_own_metadata(monkeypatch: pytest.MonkeyPatch):
    requires = ["jax<0.1", "numpy>=1", "nothing-of-this-name>=2", "torch<0.1; extra == 'test'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)
    assert doctor.misfits() == [
        Misfit(package="jax", installed=importlib.metadata.version("jax"), tested="<0.1"),
        Misfit(package="nothing-of-this-name", installed=None, tested=">=2"),
    ]


def test_nvidia_smi_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 580.159.04, 143771, 143000'\necho 'GB10, 580.1, [N/A], [N/A]'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert [(gpu.name, gpu.driver, gpu.memory_total // 2**20) for gpu in doctor.nvidia_gpus()] == [
        ("NVIDIA H200", "580.159.04", 143771)
    ]


def test_doctor_prints_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(doctor, "examine", lambda: HEALTHY)
    assert command_line.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        __version__,
        "0.11.2",
        "compute capability 9.0",
        "132.0 GiB free of 133.0 GiB",
        "op attention",
    ):
        assert fact in shown
    assert "jax-cuda12-plugin" not in shown


def test_exit_code_tells_of_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(
        doctor, "examine", lambda: changed(backend=None, backend_error="no driver", devices=[])
    )
    assert command_line.main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["jax could not start: no driver"]


def test_the_installed_command_examines_this_machine():
    command = [sys.executable, "-m", "jaxtune.cli.main", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    report = json.loads(done.stdout)
    assert done.returncode == (1 if report["problems"] else 0), done.stderr
    assert report["versions"]["jax"] == importlib.metadata.version("jax")
    assert report["implementations"]
    assert report["host_memory_total"] > 0


def test_platform_without_a_plugin_is_a_problem_and_no_traceback():
    command = [sys.executable, "-m", "jaxtune.cli.main", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "rocm"})
    assert done.returncode == 1
    assert "problem: jax could not start" in done.stdout
    assert "Traceback" not in done.stderr


def test_version(capsys: pytest.CaptureFixture[str]):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxtune {__version__}\n"


def test_own_errors_are_one_message_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> int:
        raise ConfigError("config.json is empty.", expected="a JSON object.", fix="download it again.")

    monkeypatch.setitem(command_line.COMMANDS, "fail", fail)
    assert command_line.main(["fail"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: config.json is empty.\n  expected: a JSON object.")
    assert "Traceback" not in shown
