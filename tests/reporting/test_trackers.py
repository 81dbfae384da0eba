"""Trackers are imported when they are asked for, get the same records, and do not end a run."""

import json
import struct
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from transformers.integrations.integration_utils import rewrite_logs

from jaxtune.errors import OptionError
from jaxtune.reporting import trackers

STAND_INS = {
    "wandb": """
class Run:
    def define_metric(self, name, **how): CALLS.append(("define", name, how))
    def log(self, numbers): CALLS.append(("log", numbers))
    def finish(self): CALLS.append(("end",))
def init(**options):
    CALLS.append(("begin", options))
    return Run()
""",
    "trackio": """
def init(**options): CALLS.append(("begin", options))
def log(numbers, step): CALLS.append(("log", step, numbers))
def finish(): CALLS.append(("end",))
""",
}
RECORDS = [
    {"step": 4, "epoch": 0.5, "loss": 2.0, "rewards/f/mean": 1.0},
    {"step": 4, "epoch": 0.5, "eval_loss": 3.0},
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Puts a stand-in for a package where Python finds it; what is called is in its CALLS."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(package, source=None):
        (tmp_path / f"{package}.py").write_text("CALLS = []\n" + (source or STAND_INS[package]))
        monkeypatch.delitem(sys.modules, package, raising=False)
        sys.modules.pop(package, None)
        return package

    yield install
    for package in STAND_INS:
        sys.modules.pop(package, None)


def run(name, tmp_path):
    """From begin to end."""
    (tracker,) = trackers.open_trackers([name], name="mine", project="ours", folder=tmp_path / "events")
    tracker.begin({"learning_rate": 1.0})
    for record in RECORDS:
        tracker.log(int(record["step"]), record)
    tracker.end()


def calls_of(name, tmp_path):
    """What a tracker's package is called with."""
    run(name, tmp_path)
    return sys.modules[trackers.TRACKERS[name].package].CALLS


def events(file):
    """What an event file holds: of each, its length and a checksum, then itself and its checksum."""
    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


TRAIN = {"train/epoch": 0.5, "train/loss": 2.0, "train/rewards/f/mean": 1.0}
EVAL = {"train/epoch": 0.5, "eval/loss": 3.0}


def test_tensorboard(tmp_path):
    """Its own files, as it would read them."""
    run("tensorboard", tmp_path)
    (file,) = (tmp_path / "events").iterdir()
    found = [(event.step, value) for event in events(file) for value in event.summary.value]
    (_, settings), *logged = found
    assert json.loads(settings.tensor.string_val[0].decode().strip("`\n")) == {"learning_rate": 1.0}
    expected = [(4, name, value) for record in (TRAIN, EVAL) for name, value in record.items()]
    assert [(step, value.tag, value.simple_value) for step, value in logged] == expected


def test_wandb(installed, tmp_path, monkeypatch):
    installed("wandb")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    begin, define, *logged, end = calls_of("wandb", tmp_path)
    assert begin == ("begin", {"project": "ours", "name": "mine", "config": {"learning_rate": 1.0}})
    assert define == ("define", "*", {"step_metric": "train/global_step", "step_sync": True})
    assert logged == [("log", {**record, "train/global_step": 4}) for record in (TRAIN, EVAL)]
    assert end == ("end",)
    installed("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    assert calls_of("wandb", tmp_path)[0][1]["project"] == "theirs"


def test_trackio(installed, tmp_path):
    installed("trackio")
    begin, *logged, end = calls_of("trackio", tmp_path)
    assert begin == ("begin", {"project": "ours", "name": "mine", "config": {"learning_rate": 1.0}})
    assert logged == [("log", 4, TRAIN), ("log", 4, EVAL)] and end == ("end",)


def test_names_are_those_of_transformers():
    record = {"epoch": 0.5, "loss": 2.0, "eval_loss": 3.0, "eval_b_loss": 1.0, "rewards/f/mean": 1.0}
    assert trackers.grouped({"step": 1, **record}) == rewrite_logs(record)


def test_a_failure_is_said_once_and_tried_again(caplog):
    class Flaky:
        def __init__(self):
            self.log_calls = 0

        def begin(self, settings): ...

        def log(self, step, record):
            self.log_calls += 1
            raise ConnectionError("no route to host")

        def end(self): ...

    flaky = Flaky()
    tracker = trackers.Lenient("wandb", flaky)
    tracker.begin({})
    for record in RECORDS:
        tracker.log(1, record)
    tracker.end()
    assert flaky.log_calls == 2, "the network may be back"
    assert caplog.text.count("wandb failed, and the run goes on") == 1
    assert "ConnectionError: no route to host" in caplog.text


def test_one_that_cannot_begin_is_left_alone(caplog):
    tracker = trackers.Lenient("wandb", object())
    tracker.begin({})
    tracker.log(1, {})
    tracker.end()
    assert caplog.text.count("wandb failed") == 1


@pytest.mark.parametrize(
    ("report_to", "names"),
    [
        (None, ()),
        ("none", ()),
        ([], ()),
        (["none"], ()),
        ("wandb", ("wandb",)),
        (["tensorboard", "wandb", "wandb"], ("tensorboard", "wandb")),
    ],
)
def test_which_are_meant(report_to, names):
    assert trackers.names_of(report_to) == names


def test_all_are_those_that_are_installed(installed, monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package == "trackio")
    assert trackers.names_of("all") == ("trackio",)


def test_a_mistyped_name():
    with pytest.raises(OptionError, match=r"report_to has 'wandbb'(.|\n)*Did you mean 'wandb'"):
        trackers.names_of("wandbb")


def test_a_package_that_is_missing(monkeypatch):
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(OptionError, match=r"tensorboardX is not installed(.|\n)*jaxtune\[tensorboard\]"):
        trackers.require_packages(["tensorboard"])


def test_runs_have_folders_of_their_own(tmp_path):
    assert trackers.event_folder(tmp_path, "a run/1") == tmp_path / "runs" / "a_run_1"
    assert trackers.event_folder(tmp_path, None).parent == tmp_path / "runs"
