"""Threads of the CPU backend: whatever fails, a result is right or an error is raised, and later calls work."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dcnops
from dcnops import _threads
from dcnops._arguments import shown
from dcnops._backends.cpu import deform_conv2d, threads
from tests.cases import make_conv, make_roi_pool


@pytest.fixture(autouse=True)
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[threads._Pool]:
    """Give each test a pool without threads, and four threads per call."""
    before = dcnops.get_num_threads()
    monkeypatch.setattr(threads, "_POOL", threads._Pool())
    dcnops.set_num_threads(4)
    yield threads._POOL
    dcnops.set_num_threads(before)


class Work:
    """Loop of Python pieces that records those that were begun and those that were finished."""

    def __init__(self, piece: Callable[[int], None] = lambda begin: None) -> None:
        self.piece = piece
        self.begun: list[int] = []
        self.finished: list[int] = []

    def run(self, items: int = 64, **options: Any) -> None:
        threads.parallel(self._compute, items, **options)

    def _compute(self, begin: int, end: int) -> None:
        self.begun += range(begin, end)
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.002)  # helpers are slow: the calling thread must wait for them
        self.piece(begin)
        self.finished += range(begin, end)

    def assert_complete(self, items: int = 64) -> None:
        assert sorted(self.finished) == list(range(items))


def assert_pool_works() -> None:
    work = Work()
    work.run()
    work.assert_complete()


def fail_to_start(monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]) -> None:
    """Let the start of every thread after the first `number` fail."""
    start, started = threads._thread.start_new_thread, []

    def limited(*args: Any) -> Any:
        if len(started) >= number:
            raise error("can't start new thread")
        started.append(args)
        return start(*args)

    monkeypatch.setattr(threads._thread, "start_new_thread", limited)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_threads_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]):
    fail_to_start(monkeypatch, number, error)
    for _ in range(5):
        assert_pool_works()
    case = make_conv(N=1, C=16, O=16, H=40, W=40, seed=1)
    dcnops.set_num_threads(1)
    expected = dcnops.deform_conv2d(**case.arguments())
    dcnops.set_num_threads(4)
    np.testing.assert_array_equal(dcnops.deform_conv2d(**case.arguments()), expected)


def test_threads_that_never_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "_MAX_INVITATIONS", 10)
    monkeypatch.setattr(threads._thread, "start_new_thread", lambda *args: 0)
    for _ in range(20):
        assert_pool_works()
    assert threads._POOL._invitations.qsize() <= 10


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", ["piece", "scratch"])
@pytest.mark.parametrize("in_helper", [False, True])
def test_an_exception_in_a_piece_is_raised_after_the_others(error: type[BaseException], step: str, in_helper: bool):
    raised = threading.Event()

    def fail(*_: int) -> tuple[Any, ...]:
        if in_helper == (threading.current_thread() is threading.main_thread()):
            raised.wait(5)  # let the other thread have a piece
            return ()
        raised.set()
        raise error("planted")

    work = Work(fail if step == "piece" else lambda begin: None)
    with pytest.raises(error, match="planted"):
        work.run(scratch=fail if step == "scratch" else tuple)
    finished = len(work.finished)
    time.sleep(0.01)
    assert len(work.finished) == finished < 64
    assert_pool_works()


def test_ctrl_c_at_every_moment():
    """Raise KeyboardInterrupt where Python handles signals: at the start of functions and after built-in ones."""

    def run_with_interruption(moment: int) -> bool:
        work = Work()
        count = 0

        def interrupt(frame: Any, event: str, arg: Any) -> None:
            nonlocal count
            if event in ("call", "c_return") and frame.f_code.co_filename == threads.__file__:
                count += 1
                if count == moment:
                    raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            work.run(8)
        except KeyboardInterrupt:
            assert sorted(work.begun) == sorted(work.finished)
            assert_pool_works()
            return True
        finally:
            sys.setprofile(None)
        work.assert_complete(8)
        return count >= moment

    moments = 0
    while run_with_interruption(moments + 1):
        moments += 1
    assert moments > 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_a_child_that_a_signal_handler_forks_in_the_middle_does_not_wait_for_its_helpers():
    children: list[int] = []
    is_helping, is_forked = threading.Event(), threading.Event()

    def fork(*_: Any) -> None:
        children.append(os.fork())
        is_forked.set()

    def piece(begin: int) -> None:
        if threading.current_thread() is threading.main_thread():
            is_helping.wait(5)
        elif not is_helping.is_set():
            is_helping.set()
            os.kill(os.getpid(), signal.SIGUSR1)
            is_forked.wait(5)

    before = signal.signal(signal.SIGUSR1, fork)
    parent, code = os.getpid(), 1
    try:
        Work(piece).run()
    except RuntimeError as error:
        code = 0 if "forked by a signal handler" in str(error) else 2
        assert_pool_works()
    finally:
        if os.getpid() != parent:
            os._exit(code)
        signal.signal(signal.SIGUSR1, before)
    assert os.waitpid(children[0], 0)[1] == 0
    assert code == 1  # nothing was lost in the parent


def test_the_pool_keeps_no_arrays(pool: threads._Pool):
    kept: list[Any] = []
    put = threads._POOL.run

    def run(work: Any, helpers: int) -> None:
        kept.append(work.__self__)
        put(work, helpers)

    pool.run = run  # type: ignore[method-assign]
    threads.parallel(lambda array, begin, end: None, 64, np.zeros(3))
    assert [loop._call for loop in kept] == [None]


def test_jobs_of_any_length_run_at_once():
    works = {items: Work() for items in (1, 0, 3, 64, 1001)}
    threads.parallel_jobs(*((work._compute, items) for items, work in works.items()))
    for items, work in works.items():
        work.assert_complete(items)
    threads.parallel_jobs()
    with pytest.raises(ZeroDivisionError):
        threads.parallel_jobs((works[64]._compute, 64), (lambda begin, end: 1 // 0, 2))


@pytest.mark.parametrize("span_bytes", [deform_conv2d._SPAN_BYTES, 1])
def test_results_do_not_depend_on_the_number_of_threads(span_bytes: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deform_conv2d, "_SPAN_BYTES", span_bytes)
    results: list[list[np.ndarray]] = []
    for number in (1, 2, 3, 4):
        dcnops.set_num_threads(number)
        arrays = []
        for case in (make_conv(N=1, C=48, O=24, H=30, W=31, G=2, D=3, seed=1), make_roi_pool(R=40, C=33, seed=2)):
            arrays.append(getattr(dcnops, case.operation)(**case.arguments()))
            backward = getattr(dcnops, f"{case.operation}_backward")
            arrays += [array for array in backward(case.grad_out, **case.arguments()) if array is not None]
        results.append(arrays)
    for arrays in results[1:]:
        for array, expected in zip(arrays, results[0], strict=True):
            np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("n", [0, -1, 1025, 10**5000, 1.5, "2", None], ids=lambda n: shown(n)[:20])
def test_a_wrong_number_of_threads_is_refused(n: Any):
    with pytest.raises(dcnops.ArgumentError, match="n must be an integer from 1 to 1024, got "):
        dcnops.set_num_threads(n)
    assert dcnops.get_num_threads() == 4


@pytest.mark.parametrize(
    ("omp", "numba", "quota", "expected"),
    [
        (None, None, 0, 8),
        ("4", None, 0, 4),
        ("4,2", "3", 0, 3),
        ("", "0", 0, 8),
        ("many", "-2", 0, 8),
        ("4", "5", 2, 2),
    ],
)
def test_the_default_is_the_smallest_limit(
    monkeypatch: pytest.MonkeyPatch, omp: str | None, numba: str | None, quota: int, expected: int
):
    for name, value in (("OMP_NUM_THREADS", omp), ("NUMBA_NUM_THREADS", numba)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(_threads, "_available_cores", lambda: 8)
    monkeypatch.setattr(_threads, "_quota", lambda root: quota)
    assert _threads._default.__wrapped__() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/a", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 0),
        (
            {
                "proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/docker/1\n0::/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu.max": "garbage",
            },
            1,
        ),
        ({"proc/self/cgroup": "2:cpu:/", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1"}, 0),
    ],
)
def test_quotas_of_control_groups(tmp_path: Path, files: dict[str, str], expected: int):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert _threads._quota(tmp_path) == expected
