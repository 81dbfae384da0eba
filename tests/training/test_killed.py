"""A run that is killed again and again, while it saves too, repeats the losses of one that is not."""

import json
import multiprocessing
import random
import time

import pytest

from jaxtune.training.checkpoints import RUN, STATE, saved
from tests.training import killed_run

KILLS = 20


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()[1:]
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def newest_step(folder):
    return int(saved(folder)[-1].name.rpartition("-")[2]) if saved(folder) else 0


@pytest.fixture(scope="module")
def start():
    """Starts the run in a process that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([killed_run.__name__])

    def start(folder):
        process = context.Process(target=killed_run.run, args=(folder,))
        process.start()
        return process

    return start


@pytest.mark.timeout(600)
def test_killed_at_twenty_moments(tmp_path, start):
    undisturbed = start(tmp_path / "undisturbed")
    folder, moments, during_a_save = tmp_path / "killed", random.Random(0), 0
    for _ in range(KILLS):
        process, before = start(folder), newest_step(folder)
        while process.is_alive() and newest_step(folder) == before:
            time.sleep(0.002)  # there is progress between two kills, and each meets a run that trains
        time.sleep(moments.uniform(0, 0.1))
        assert process.is_alive(), "the run is too short for so many"
        process.kill()
        process.join()
        during_a_save += bool(list(folder.glob(".checkpoint-*")))
        for checkpoint in saved(folder):
            assert (checkpoint / RUN).is_file() and (checkpoint / STATE).is_dir()
    assert during_a_save, "none of them hit a save"
    last = start(folder)
    for process in (last, undisturbed):
        process.join()
        assert process.exitcode == 0
    assert losses(folder) == losses(tmp_path / "undisturbed")
    assert len(losses(folder)) == killed_run.STEPS // 4
