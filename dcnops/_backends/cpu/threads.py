"""Threads of the CPU backend: compiled loops without the GIL, in a thread pool of the library's own.

That is safe to call from any number of threads and after a fork, leaves no busy-waiting threads behind for the caller's
next operation, and no result depends on the number of threads. Numba's own threads are none of this: its portable
threading layer ends the process when two threads enter it at once.
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
"""As many as there are cores, or what the environment variable NUMBA_NUM_THREADS says."""

PIECES_PER_THREAD = 4


class _Pool:
    """Threads that help the calling one; started on first use, and again in a forked child, which inherits none."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None], helpers: int) -> None:
        """Call `work` in this thread and, as far as threads are free, in `helpers` others; return when all are done."""
        futures = []
        if helpers:
            with self._lock:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(THREADS - 1, thread_name_prefix="dcnops")
            try:
                futures = [self._executor.submit(work) for _ in range(helpers)]
            except RuntimeError:
                # The interpreter is shutting down and starts no more threads: this one does it all.
                futures = []
        work()
        for future in futures:
            if not future.cancel():
                future.result()


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


_LOCAL = threading.local()
_WORTH_A_THREAD = 2**18
"""Multiply-adds: some tens of microseconds, what it takes to wake a thread."""


@contextlib.contextmanager
def alone_below(work: int) -> Iterator[None]:
    """Keep a call of so few multiply-adds that no other thread is worth waking in this one."""
    _LOCAL.alone = work < _WORTH_A_THREAD
    try:
        yield
    finally:
        _LOCAL.alone = False


def parallel(
    kernel: Callable[..., None],
    items: int,
    *args: Any,
    scratch: Callable[[], tuple[Any, ...]] = tuple,
    pieces_per_thread: int = PIECES_PER_THREAD,
    least: int = 1,
) -> None:
    """Call ``kernel(*args, *scratch(), begin, end)`` for pieces of the items, at least `least` each, on all threads."""
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

    alone = getattr(_LOCAL, "alone", False)
    _POOL.run(work, 0 if alone else min(THREADS, -(-items // size)) - 1)
    # A cancelled helper may stay in the pool's queue for a while: it must not keep the arrays.
    args = ()
