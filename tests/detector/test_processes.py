"""Functions that run in other processes, and memory that processes share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from dcnops.detector.errors import UserError
from dcnops.detector.processes import in_background, link_to, map_link, packed_in_background, unpack


def test_results_and_errors_of_another_process(monkeypatch):
    def make() -> tuple[int, list[np.ndarray]]:
        return os.getpid(), [np.arange(10.0**6), np.arange(6)[::2], np.zeros(0)]

    def refuse() -> None:
        raise UserError("refused")

    def lack() -> None:
        os.stat("a file that does not exist")

    with in_background(lambda: signal.getsignal(signal.SIGINT)) as result:
        assert result() == signal.SIG_DFL
    with in_background(lack) as lacking, pytest.raises(FileNotFoundError, match="a file that does not exist"):
        lacking()
    with in_background(make) as result, in_background(refuse) as refused:
        process, arrays = result()
        assert process != os.getpid() and [array.tolist() for array in arrays[1:]] == [[0, 2, 4], []]
        assert np.array_equal(arrays[0], np.arange(10.0**6)) and all(array.flags.aligned for array in arrays)
        arrays[0] += 1  # a copy can be changed
        with pytest.raises(UserError, match="refused"):
            refused()
    # Python of conda and uv may lack `memfd_create`, as it is built for old systems.
    monkeypatch.setattr(os, "memfd_create", Mock(side_effect=OSError))
    for lacking in (False, True):
        if lacking:
            monkeypatch.delattr(os, "memfd_create")
        with in_background(make) as result, packed_in_background(make) as packed:
            assert np.array_equal(result()[1][0], np.arange(10.0**6))
            spans, file = packed()
            assert np.array_equal(unpack(spans, map_link(link_to(file)))[1][0], np.arange(10.0**6))
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


def test_arrays_take_memory_when_they_are_used():
    """Also in several processes they take it once."""
    page = os.sysconf("SC_PAGE_SIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()
    with packed_in_background(lambda: np.ones(10**7)) as result:
        spans, file = result()
        first, second = (unpack(spans, map_link(link_to(file))) for _ in range(2))
    assert resident() - before < 10**7
    second[0] = 2
    assert first.sum() == len(first)
    assert 0.9 * first.nbytes < resident() - before < 1.5 * first.nbytes


def test_links_to_a_file_of_another_machine(tmp_path):
    with open(tmp_path / "a", "w+b") as file:
        path, target = link_to(file)
        file.write(b"content")
        file.flush()
        assert map_link((path, target))[:] == b"content"
        for link in ((path, "/memfd:other (deleted)"), ("/proc/0/fd/3", target), None):
            assert map_link(link) is None


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
