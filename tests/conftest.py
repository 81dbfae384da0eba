"""What every test runs under: eight simulated CPU devices, no network, and arithmetic that hides nothing.

On a GPU: `JAX_PLATFORMS=cuda pytest -m gpu`.
"""

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

# All of these are read once, when jax, torch or huggingface_hub is imported, and are inherited by the processes that
# tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
    )
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # torch's threads: the workers use the other cores already

# What one test compiles, another test, worker or subprocess of this run may load. Workers inherit the folder from the
# process that made it, which deletes it when the run is over.
_COMPILED = None
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _COMPILED = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxtune-tests-")

import jax
import optax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # bfloat16 does not become float32 by accident
jax.config.update("jax_numpy_rank_promotion", "raise")  # nor does [T] meet [B, T] unnoticed
jax.config.update("jax_default_matmul_precision", "highest")  # comparisons see algorithms, not TF32


def _under_standard_promotion(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return call


def _exempt_optax_from_strict_promotion() -> None:
    """Strictness is for our code. optax counts steps in int32 and computes `1 - decay**count` and its schedules from
    that, so Adam alone would not run; its transformations and schedules keep JAX's standard promotion."""
    make = optax.GradientTransformation.__new__

    def new(cls: type, init: Callable, update: Callable) -> Any:
        return make(cls, _under_standard_promotion(init), _under_standard_promotion(update))

    optax.GradientTransformation.__new__ = new

    def schedule(factory: Callable) -> Callable:
        return functools.wraps(factory)(lambda *args, **kw: _under_standard_promotion(factory(*args, **kw)))

    for module in (optax, optax.schedules):
        for name in [name for name in dir(module) if name.endswith(("_schedule", "_schedules"))]:
            setattr(module, name, schedule(getattr(module, name)))


_exempt_optax_from_strict_promotion()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and jax.default_backend() != "gpu":
        pytest.skip(f"needs an NVIDIA GPU, and jax runs on {jax.default_backend()}: set JAX_PLATFORMS=cuda")


def pytest_unconfigure() -> None:
    if _COMPILED is not None:
        shutil.rmtree(_COMPILED, ignore_errors=True)
