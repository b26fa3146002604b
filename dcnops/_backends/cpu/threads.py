"""Thread pool of the CPU backend, which runs compiled loops without the GIL.

The pool can be used from any number of threads and after a fork, and leaves no busy-waiting threads behind. Results do
not depend on the number of threads. Numba's own threading layers do not offer this: the portable one terminates the
process if two threads enter it at the same time.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba

THREADS: int = numba.config.NUMBA_NUM_THREADS
"""Number of cores, or the value of the environment variable NUMBA_NUM_THREADS."""

PIECES_PER_THREAD = 4


class _Pool:
    """Helper threads, started on first use, and again after a fork because a child process inherits no threads."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all threads."""
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None], helpers: int) -> None:
        """Call `work` in this thread and in up to `helpers` free threads, and wait until all are done."""
        futures = []
        if helpers:
            with self._lock:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="dcnops")
            try:
                futures = [self._executor.submit(work) for _ in range(helpers)]
            except RuntimeError:
                # The interpreter is shutting down and starts no more threads, so this thread does all the work.
                futures = []
        work()
        for future in futures:
            if not future.cancel():
                future.result()


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.reset)

_LOCAL = threading.local()
_WORTH_A_THREAD = 2**18
"""Multiply-adds that take as long as waking a thread, some tens of microseconds."""


@contextlib.contextmanager
def serial_if_small(multiply_adds: int) -> Iterator[None]:
    """Run everything in the calling thread if the work is too small to wake another one."""
    _LOCAL.serial = multiply_adds < _WORTH_A_THREAD
    try:
        yield
    finally:
        _LOCAL.serial = False


def parallel(
    kernel: Callable[..., None],
    items: int,
    *args: Any,
    scratch: Callable[[], tuple[Any, ...]] = tuple,
    pieces_per_thread: int = PIECES_PER_THREAD,
    least: int = 1,
) -> None:
    """Call ``kernel(*args, *scratch(), begin, end)`` on all threads, for ranges of at least `least` items."""
    size = max(least, -(-items // (THREADS * pieces_per_thread)))
    starts = iter(range(0, items, size))
    lock = threading.Lock()

    def work() -> None:
        buffers: tuple[Any, ...] | None = None
        while True:
            with lock:
                begin = next(starts, None)
            if begin is None:
                return
            if buffers is None:
                buffers = scratch()
            kernel(*args, *buffers, begin, min(begin + size, items))

    serial = getattr(_LOCAL, "serial", False)
    _POOL.run(work, 0 if serial else min(THREADS, -(-items // size)) - 1)
    # A cancelled helper may stay in the queue of the pool for a while and must not keep the arrays alive.
    args = ()
