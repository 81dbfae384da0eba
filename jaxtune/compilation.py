"""JAX's persistent compilation cache, on by default on a GPU: the second run of a model starts in seconds."""

import os
from pathlib import Path

import jax


def enable_cache() -> None:
    """Sets the cache's folder unless the user has (JAX_COMPILATION_CACHE_DIR). Not on CPU, where programs compile
    quickly and cached ones are tied to the very processor."""
    if jax.config.jax_compilation_cache_dir is None and jax.default_backend() == "gpu":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "jaxtune" / "compiled"))
        # A run has dozens of small programs, a tenth of a second each.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
