"""Tensors that are read, merged, by threads some way ahead of whoever writes them."""

from collections.abc import Callable, Generator, Iterable

import numpy as np
from threadpoolctl import threadpool_limits

from jaxtune.loading.read_ahead import read_ahead

AHEAD = 1 << 30
"""Bytes of tensors that may wait to be written."""


def ahead[T](
    jobs: Iterable[tuple[T, int]], read: Callable[[T], np.ndarray]
) -> Generator[tuple[T, np.ndarray]]:
    """For each (job, bytes) in turn, the job and what `read(job)` gives."""
    # Each thread computes for itself: those that BLAS starts for one would wait for those that it starts for another.
    with threadpool_limits(1, user_api="blas"):
        for job, found in read_ahead(jobs, lambda job: {"": read(job)}, ahead=AHEAD):
            yield job, found[""]
