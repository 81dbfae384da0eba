"""The progress bar shows in a terminal and in a notebook, and nowhere else."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

COUNT = "from jaxtune.progress import progress_bar\nfor _ in progress_bar(range(3), desc='counting'): pass"
IN_A_NOTEBOOK = "import sys; sys.modules['ipykernel.zmqshell'] = None\n"


def read_all(descriptor: int) -> str:
    found = b""
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError:  # how a terminal says that nobody writes any more
            piece = b""
        if not piece:
            return found.decode()
        found += piece


def test_in_a_terminal():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", COUNT], stderr=theirs)
    os.close(theirs)
    shown = read_all(ours)
    os.close(ours)
    assert process.wait() == 0
    assert "counting: 100%" in shown


@pytest.mark.parametrize(("before", "shown"), [("", False), (IN_A_NOTEBOOK, True)])
def test_elsewhere(before, shown):
    done = subprocess.run([sys.executable, "-c", before + COUNT], capture_output=True, text=True, check=True)
    assert ("counting: 100%" in done.stderr) == shown
