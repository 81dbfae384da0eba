"""Brings mapped files into memory ahead of whoever uses them: several threads touch pages, in order, within a bound.

Nothing is copied: an array stays a view into its file, and its pages are the system's to take back.
"""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable

import numpy as np

THREADS = 8
AHEAD = 1 << 30
"""Bytes that may be brought in before they are used."""
_PAGE = 4096


def read_ahead[T](
    jobs: Iterable[tuple[T, int]], read: Callable[[T], dict[str, np.ndarray]], *, ahead: int = AHEAD
) -> Generator[tuple[T, dict[str, np.ndarray]]]:
    """For each (job, bytes) in turn, the job and what `read(job)` gives, its pages already in memory.

    At most `ahead` bytes, or one job, are waiting to be taken at any time."""

    def bring(job: T) -> dict[str, np.ndarray]:
        arrays = read(job)
        for array in arrays.values():
            _touch(array)
        return arrays

    pool = concurrent.futures.ThreadPoolExecutor(THREADS, thread_name_prefix="jaxtune-read")
    waiting: collections.deque[tuple[T, int, concurrent.futures.Future]] = collections.deque()
    try:
        pending = 0
        for job, size in jobs:
            while waiting and pending + size > ahead:
                taken, its_size, future = waiting.popleft()
                pending -= its_size
                yield taken, future.result()
            waiting.append((job, size, pool.submit(bring, job)))
            pending += size
        while waiting:
            taken, _, future = waiting.popleft()
            yield taken, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _touch(array: np.ndarray) -> None:
    """Reads a byte of every page; numpy lets other threads run meanwhile."""
    if isinstance(array, np.ndarray) and array.nbytes > _PAGE:
        np.maximum.reduce(array.reshape(-1).view(np.uint8)[::_PAGE])
