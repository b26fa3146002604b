"""Functions that run in other processes."""

from __future__ import annotations

import os

import numpy as np
import pytest

from dcnops.detector.errors import UserError
from dcnops.detector.processes import in_background


def test_results_and_errors_of_another_process(monkeypatch):
    def make() -> tuple[int, list[np.ndarray]]:
        return os.getpid(), [np.arange(10.0**6), np.arange(6)[::2], np.zeros(0)]

    def refuse() -> None:
        raise UserError("refused")

    with in_background(make, niceness=1) as result, in_background(refuse) as refused:
        process, arrays = result()
        assert process != os.getpid() and [array.tolist() for array in arrays[1:]] == [[0, 2, 4], []]
        assert np.array_equal(arrays[0], np.arange(10.0**6))
        arrays[0] += 1  # a copy can be changed
        with pytest.raises(UserError, match="refused"):
            refused()
    monkeypatch.setattr("dcnops.detector.processes.CAN_COPY", False)
    with in_background(make) as result:
        assert result()[0] == os.getpid()


def test_a_process_that_ends_early(capfd):
    def fail() -> None:
        raise ZeroDivisionError

    for make in (fail, lambda: os._exit(1)):
        with in_background(make) as result, pytest.raises(UserError, match="a process that reads the data ended"):
            result()
    assert capfd.readouterr().err.count("Traceback") == 1


def test_a_process_ends_with_the_context(monkeypatch):
    started, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: started.append(fork()) or started[-1])
    with pytest.raises(KeyboardInterrupt), in_background(lambda: list(iter(int, 1))):
        raise KeyboardInterrupt
    with pytest.raises(ChildProcessError):
        os.waitpid(started[0], os.WNOHANG)
