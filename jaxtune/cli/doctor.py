"""`jaxtune doctor`: what this machine is, what runs on it, and what is wrong with it.

`examine` collects facts; `problems` (training will not work as it should: exit code 1) and `advice` (it will, but
could be better: exit code 0) judge them.
"""

import dataclasses
import glob
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from typing import TYPE_CHECKING, Annotated

import tyro
from packaging.requirements import Requirement

from jaxtune.version import __version__

if TYPE_CHECKING:
    import jax

SHOWN = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "flax",
    "optax",
    "numpy",
    "ml_dtypes",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "datasets",
)
"""Packages whose version is worth reading in a bug report."""

MiB, GiB = 2**20, 2**30
USABLE_SHARE = 0.8
"""Advice is given when XLA may use, or other processes leave, less of a GPU's memory than this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device as jax sees it. Sizes are in bytes, and None where the backend does not tell."""

    id: int
    kind: str
    compute_capability: str | None = None
    memory_limit: int | None = None
    memory_in_use: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class NvidiaGPU:
    """One GPU as the NVIDIA driver sees it, before jax started. Sizes are in bytes."""

    name: str
    driver: str
    memory_total: int
    memory_free: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Misfit:
    """An installed (or missing) package that jaxtune's own requirements exclude."""

    package: str
    installed: str | None
    tested: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    python: str
    system: str
    versions: dict[str, str | None]
    misfits: list[Misfit] | None
    """None if jaxtune is imported from its folder without being installed: then its requirements are not known."""
    backend: str | None
    """jax's default backend, or None if jax could not start one."""
    backend_error: str | None
    devices: list[Device]
    nvidia: list[NvidiaGPU]
    nvidia_present: bool
    """There is an NVIDIA GPU, whether or not nvidia-smi could describe it."""
    host_memory_total: int | None
    host_memory_available: int | None
    compilation_cache: str | None
    implementations: dict[str, str]
    """Which implementation each op of `jaxtune.kernels` uses here."""


def doctor(as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> int:
    """Says what this machine is, which implementation each op uses on it, and what is wrong.

    Args:
        as_json: Print the report as JSON.

    Returns:
        1 if something keeps jaxtune from training here as it should, else 0.
    """
    report = examine()
    wrong, better = problems(report), advice(report)
    if as_json:
        found = {"jaxtune": __version__, **dataclasses.asdict(report), "problems": wrong, "advice": better}
        print(json.dumps(found, indent=2))
    else:
        print(render(report))
        for title, lines in (("problem", wrong), ("advice", better)):
            for line in lines:
                print(f"\n{title}: {line}")
        if not wrong:
            print("\nNo problem found.")
    return 1 if wrong else 0


def examine() -> Report:
    nvidia = nvidia_gpus()  # first: once jax has started, this process is among those that hold memory
    # Looking must not take three quarters of a GPU on which something else may be training.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    from jaxtune import compilation, kernels

    try:
        backend, backend_error, devices = jax.default_backend(), None, [_device(d) for d in jax.devices()]
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # jax asserts where a platform that was asked for has no plugin
        asked = os.environ.get("JAX_PLATFORMS", "")
        backend, backend_error, devices = None, str(error) or f"no backend for JAX_PLATFORMS={asked}", []
    else:
        compilation.enable_cache()  # as loading a model does, to see the folder
    total, available = host_memory()
    return Report(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        versions={name: installed_version(name) for name in SHOWN},
        misfits=misfits(),
        backend=backend,
        backend_error=backend_error,
        devices=devices,
        nvidia=nvidia,
        nvidia_present=bool(nvidia or glob.glob("/dev/nvidia[0-9]*")),
        host_memory_total=total,
        host_memory_available=available,
        compilation_cache=jax.config.jax_compilation_cache_dir,
        implementations=kernels.implementations() if backend else {},
    )


def problems(report: Report) -> list[str]:
    """What keeps jaxtune from training here as it should, each with its remedy."""
    found = []
    if report.backend is None:
        found.append(f"jax could not start: {report.backend_error}")
    elif report.nvidia_present and report.backend == "cpu":
        reason = (
            f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} asks for it"
            if "cpu" in os.environ.get("JAX_PLATFORMS", "").split(",")
            else "install jax's CUDA plugin: pip install 'jaxtune[cuda13]', or cuda12 for drivers before 580"
        )
        found.append(f"this machine has an NVIDIA GPU, but jax uses the CPU; {reason}")
    for misfit in report.misfits or ():
        state = f"{misfit.installed} is outside the tested range" if misfit.installed else "is missing"
        found.append(f"{misfit.package} {state}: pip install '{misfit.package}{misfit.tested}'")
    return found


def advice(report: Report) -> list[str]:
    """What works, but could be better."""
    found = []
    for index, gpu in enumerate(report.nvidia):
        if gpu.memory_free < USABLE_SHARE * gpu.memory_total:
            held = gpu.memory_total - gpu.memory_free
            found.append(
                f"other processes hold {_gib(held)} of {_gib(gpu.memory_total)} on GPU {index}: see nvidia-smi"
            )
    limits = [device.memory_limit for device in report.devices if device.memory_limit]
    if report.backend == "gpu" and report.nvidia and limits:
        limit, total = min(limits), max(gpu.memory_total for gpu in report.nvidia)
        if limit < USABLE_SHARE * total:
            found.append(
                f"XLA will use at most {_gib(limit)} of a GPU's {_gib(total)}: "
                "set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 before Python starts to train larger models"
            )
    if report.misfits is None:
        found.append(
            "jaxtune is not installed, only imported: versions could not be compared with its ranges"
        )
    return found


def render(report: Report) -> str:
    """The report as aligned lines for people."""
    rows = [("jaxtune", __version__), ("python", report.python), ("system", report.system)]
    rows += [(name, version) for name, version in report.versions.items() if version]
    rows += [
        (f"GPU {i}", f"{gpu.name}, driver {gpu.driver}, {_free(gpu.memory_free, gpu.memory_total)}")
        for i, gpu in enumerate(report.nvidia)
    ]
    rows += [("backend", report.backend or "none")]
    rows += [(f"device {device.id}", _device_line(device)) for device in report.devices]
    rows += [("host memory", _free(report.host_memory_available, report.host_memory_total))]
    rows += [("compilation cache", report.compilation_cache or "off")]
    rows += [(f"op {name}", implementation) for name, implementation in report.implementations.items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def misfits() -> list[Misfit] | None:
    """Compares what is installed with the requirements in jaxtune's own metadata (pyproject.toml is their source)."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("jaxtune") or ()]
    except importlib.metadata.PackageNotFoundError:
        return None
    found = []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = installed_version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            tested = str(requirement.specifier)
            found.append(Misfit(package=requirement.name, installed=version, tested=tested))
    return found


def nvidia_gpus() -> list[NvidiaGPU]:
    """What nvidia-smi says; empty if there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,driver_version,memory.total,memory.free"
    try:
        answer = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.split(", ") for line in answer.stdout.splitlines()] if answer.returncode == 0 else []
    return [
        NvidiaGPU(name=name, driver=driver, memory_total=int(total) * MiB, memory_free=int(free) * MiB)
        for name, driver, total, free in rows
        if total.isdigit() and free.isdigit()  # "[N/A]" where the GPU shares the host's memory
    ]


def host_memory() -> tuple[int | None, int | None]:
    """(total, available) bytes of this machine, None where the system does not tell."""
    try:
        with open("/proc/meminfo") as file:
            kib = {name: int(value.split()[0]) for name, value in (line.split(":") for line in file)}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None


def _device(device: "jax.Device") -> Device:
    stats = device.memory_stats() or {}  # None on the CPU
    return Device(
        id=device.id,
        kind=device.device_kind,
        compute_capability=getattr(device, "compute_capability", None),
        memory_limit=stats.get("bytes_limit"),
        memory_in_use=stats.get("bytes_in_use"),
    )


def _device_line(device: Device) -> str:
    parts = [device.kind]
    if device.compute_capability:
        parts.append(f"compute capability {device.compute_capability}")
    if device.memory_limit is not None:
        parts.append(
            _free(device.memory_limit - (device.memory_in_use or 0), device.memory_limit) + " for XLA"
        )
    return ", ".join(parts)


def _free(free: int | None, total: int | None) -> str:
    return f"{_gib(free)} free of {_gib(total)}"


def _gib(size: int | None) -> str:
    return "an unknown amount" if size is None else f"{size / GiB:.1f} GiB"
