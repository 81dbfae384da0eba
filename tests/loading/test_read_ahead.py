"""Reading ahead: in order, by several threads, and never further ahead than the bound."""

import threading
import time

import numpy as np
import pytest

from jaxtune.loading.read_ahead import read_ahead


def run(sizes, ahead, slow=lambda i: 0.0):
    """What was yielded, and for each job how many bytes were read and not yet taken when its reading began."""
    lock, started, waiting = threading.Lock(), {}, [0]

    def read(job):
        with lock:
            waiting[0] += sizes[job]
            started[job] = waiting[0]
        time.sleep(slow(job))
        return {"weight": np.full(10_000, job, np.uint8)}

    order = []
    for job, arrays in read_ahead(((i, size) for i, size in enumerate(sizes)), read, ahead=ahead):
        assert (arrays["weight"] == job).all()
        order.append(job)
        with lock:
            waiting[0] -= sizes[job]
    return order, started


def test_in_order_whatever_takes_long():
    order, _ = run([1] * 20, 8, slow=lambda i: 0.02 * (i % 3 == 0))
    assert order == list(range(20))


def test_never_more_than_the_bound_or_one():
    _, started = run([3, 3, 3, 50, 3, 3], 7)
    # The job that is in the consumer's hands counts until it asks for the next.
    assert all(waiting <= 7 + 50 for waiting in started.values())
    assert started[1] <= 7 and started[2] <= 7 + 3


def test_a_failure_is_the_consumers():
    def read(job):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        list(read_ahead([(0, 1), (1, 1)], read))


def test_one_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    jobs = read_ahead(((i, 1) for i in range(100)), lambda job: {}, ahead=4)
    next(jobs)
    jobs.close()
    assert threading.active_count() == before
