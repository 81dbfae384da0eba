"""What every test runs under: eight simulated CPU devices, no network, and arithmetic that hides nothing.

On a GPU: `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

import gc
import logging
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path

# All of these are read once, when jax, torch or huggingface_hub is imported, and are inherited by the processes that
# tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )
os.environ.setdefault(
    "JAXTUNE_TEST_SEED", str(secrets.randbelow(2**31))
)  # of inputs that are new in every run
# XLA's own passes stay; LLVM's, which are most of the time of compiling, are left out, but for the folders of EXACT.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads: the workers use the other cores already

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What one test compiles, another test, worker or subprocess of this run may load. Workers inherit the folder from the
# process that made it, which deletes it when the run is over.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxtune-tests-")

import jax
import pytest

from tests.kit import gpu_runs, published

EXACT = ("export", "gpu", "kernels", "parity", "quant")

jax.config.update("jax_numpy_dtype_promotion", "strict")  # bfloat16 does not become float32 by accident
jax.config.update("jax_numpy_rank_promotion", "raise")  # nor does [T] meet [B, T] unnoticed
jax.config.update("jax_default_matmul_precision", "highest")  # comparisons see algorithms, not TF32


def pytest_report_header(config: pytest.Config) -> list[str]:
    seed = [f"seed: {gpu_runs.SEED} (JAXTUNE_TEST_SEED)"] if config.option.markexpr == "gpu" else []
    return [published.said(), *seed]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    written = gpu_runs.record(terminalreporter.stats)
    line = f"wrote {written}" if written else gpu_runs.staleness()
    if line:
        terminalreporter.write_line(line)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, and jax runs on {jax.default_backend()}: set JAX_PLATFORMS=cuda")


@pytest.fixture(autouse=True)
def _logging_as_users_find_it():
    """Loading and training switch jaxtune's messages on, for the whole process: not for the next test."""
    logger = logging.getLogger("jaxtune")
    logger.setLevel(logging.NOTSET)
    logger.handlers.clear()


@pytest.fixture(scope="module", autouse=True)
def _programs_as_users_have_them(request: pytest.FixtureRequest):
    """Where bits are compared with other software's, they have to stand what LLVM's passes do, as to join products and
    sums."""
    is_exact = request.path.relative_to(Path(__file__).parent).parts[0] in EXACT
    if jax.config.read("jax_disable_most_optimizations") == is_exact:
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", not is_exact)


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Every compiled program takes some of the memory mappings that Linux lets a process have, 65,530: a worker that
    keeps them all is aborted. What is needed again lies in the folder of compiled programs."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


def pytest_unconfigure() -> None:
    if _COMPILED is not None:
        shutil.rmtree(_COMPILED, ignore_errors=True)
