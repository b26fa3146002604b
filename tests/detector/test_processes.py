"""Functions that run in other processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest

from dcnops.detector.errors import UserError
from dcnops.detector.processes import in_background


def test_results_and_errors_of_another_process(monkeypatch):
    def make() -> tuple[int, list[np.ndarray]]:
        return os.getpid(), [np.arange(10.0**6), np.arange(6)[::2], np.zeros(0)]

    def refuse() -> None:
        raise UserError("refused")

    def lack() -> None:
        os.stat("a file that does not exist")

    with in_background(lambda: (os.nice(0), signal.getsignal(signal.SIGINT)), niceness=1) as result:
        assert result() == (os.nice(0) + 1, signal.SIG_DFL)
    with in_background(lack) as lacking, pytest.raises(FileNotFoundError, match="a file that does not exist"):
        lacking()
    with in_background(make) as result, in_background(refuse) as refused:
        process, arrays = result()
        assert process != os.getpid() and [array.tolist() for array in arrays[1:]] == [[0, 2, 4], []]
        assert np.array_equal(arrays[0], np.arange(10.0**6))
        arrays[0] += 1  # a copy can be changed
        with pytest.raises(UserError, match="refused"):
            refused()
    for name, value in (("os.fork", Mock(side_effect=BlockingIOError)), ("CAN_COPY", False)):
        monkeypatch.setattr(f"dcnops.detector.processes.{name}", value)
        with in_background(make) as result:
            assert result()[0] == os.getpid()


def test_a_process_that_ends_early(capfd):
    def fail() -> None:
        raise ZeroDivisionError

    for make in (fail, lambda: os._exit(1)):
        with in_background(make) as result, pytest.raises(UserError, match="a process that reads the data ended"):
            result()
    assert capfd.readouterr().err.count("Traceback") == 1


@pytest.fixture
def started(monkeypatch):
    """Return a list of the processes that were started."""
    processes, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: processes.append(fork()) or processes[-1])
    return processes


def test_a_process_that_is_killed_while_it_sends(started):
    with in_background(lambda: list(range(300_000))) as result, pytest.raises(UserError, match="give the program more"):
        time.sleep(0.2)  # now the pipe is full
        os.kill(started[0], signal.SIGKILL)
        result()


def test_a_process_ends_with_the_context(started):
    with pytest.raises(KeyboardInterrupt), in_background(lambda: list(iter(int, 1))):
        raise KeyboardInterrupt
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], os.WNOHANG)


def test_processes_end_with_the_first_one():
    """Also a process that another one in the background has started."""
    code = """
import os, signal, time
from dcnops.detector.processes import in_background
begun, begin = os.pipe()
def make(depth=1):
    with in_background(lambda: make(depth - 1)) if depth else in_background(lambda: time.sleep(60)) as result:
        os.write(1, b"started\\n")  # in one piece
        os.write(begin, b".")
        result()
with in_background(make):
    os.read(begun, 1), os.read(begun, 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=30)[0] == "started\n" * 2  # returns when all processes have ended
    assert process.returncode == -signal.SIGKILL
