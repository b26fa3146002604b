"""Thread pool of the CPU backend, which runs compiled loops without the GIL.

The pool can be used from any number of threads and after a fork, and leaves no busy-waiting threads behind. Results do
not depend on the number of threads. Numba's own threading layers do not offer this: the portable one terminates the
process if two threads enter it at the same time.

A loop takes helper threads as they come: it needs none of them, so it does not matter if a thread cannot be started or
never gets to run. It only waits for the pieces that helpers have begun, whatever happens in the calling thread.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

from dcnops._threads import threads_of_call

PIECES_PER_THREAD = 4

_MAX_INVITATIONS = 4096
_LOCAL = threading.local()


class _Loop:
    """Work of one call of `parallel`, of which the calling thread and its helpers take pieces."""

    def __init__(
        self, kernel: Callable[..., None], args: tuple[Any, ...], scratch: Callable[[], tuple[Any, ...]],
        items: int, size: int,
    ) -> None:  # fmt: skip
        self._call: Any = kernel, args, scratch
        self._items, self._size = items, size
        self._starts = iter(range(0, items, size))
        self._lock = _thread.allocate_lock()
        self._is_closed = False
        self._busy = 0  # helpers that have a piece
        self._helpers_done = _thread.allocate_lock()  # released by the last helper of a closed loop
        self._helpers_done.acquire()
        self._error: BaseException | None = None

    def run(self, helpers: int) -> None:
        """Compute everything, with up to `helpers` other threads."""
        outer, _LOCAL.loop = getattr(_LOCAL, "loop", None), self
        try:
            _POOL.run(self.work, helpers)
        finally:
            try:
                self._finish()
            except BaseException:
                self._finish()  # Ctrl-C may come before it has begun
                raise
            finally:
                _LOCAL.loop = outer
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it refers to this frame

    def work(self, is_helper: bool = False) -> None:
        """Take pieces as long as there are any. In a helper thread, leave an exception to the calling thread."""
        try:
            self._take_pieces(is_helper)
        except BaseException as error:
            if not is_helper:
                raise
            self._error = error
            self._close()

    def _take_pieces(self, is_helper: bool) -> None:
        buffers: tuple[Any, ...] | None = None
        while True:
            with self._lock:
                begin = None if self._is_closed else next(self._starts, None)
                if begin is None:
                    return
                self._busy += is_helper
            try:
                kernel, args, scratch = self._call
                if buffers is None:
                    buffers = scratch()
                kernel(*args, *buffers, begin, min(begin + self._size, self._items))
            finally:
                if is_helper:
                    self._end_piece()

    def _end_piece(self) -> None:
        with self._lock:
            self._busy -= 1
            if self._is_closed and not self._busy:
                self._helpers_done.release()

    def _close(self) -> None:
        """Hand out no more pieces: from now on, `_busy` can only decrease."""
        with self._lock:
            self._is_closed = True

    def _finish(self) -> None:
        """Close the loop and wait for the helpers, which use the caller's arrays, even if Ctrl-C is pressed."""
        interruption: BaseException | None = None
        while not self._is_closed or self._busy:
            try:
                self._close()
                if self._busy:
                    self._helpers_done.acquire()
            except BaseException as error:
                interruption = error
        self._call = None  # the pool may keep the loop for a while, but not its arrays
        if interruption is not None:
            raise interruption

    def abandon_helpers(self) -> None:
        """Account for the loss of all helpers in a child process that was forked in the middle of the loop."""
        was_locked = self._lock.locked()
        self._lock = _thread.allocate_lock()
        if self._busy or was_locked:
            self._busy = 0
            self._error = RuntimeError("the process was forked by a signal handler in the middle of a dcnops call")
            if self._helpers_done.locked():
                self._helpers_done.release()


class _Pool:
    """Helper threads, started when they are first needed, and again after a fork: a child process inherits none."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all threads."""
        self._invitations: SimpleQueue[Callable[..., None]] = SimpleQueue()
        self._threads = 0
        self._lock = threading.RLock()

    def run(self, work: Callable[..., None], helpers: int) -> None:
        """Call ``work()`` in this thread, and ``work(True)`` in up to `helpers` others as soon as they are free."""
        if self._threads < helpers:
            self._start_threads(helpers)
        for _ in range(min(helpers, self._threads)):
            if self._invitations.qsize() < _MAX_INVITATIONS:  # it grows only if no helper gets to run
                self._invitations.put(work)
        work()

    def _start_threads(self, number: int) -> None:
        with self._lock:
            while self._threads < number:
                try:
                    # Unlike threading.Thread.start, this does not wait for the thread, which may lack memory to begin.
                    _thread.start_new_thread(self._serve, (self._invitations,))
                except (RuntimeError, MemoryError):
                    return  # a limit of the system or of a container, or the end of the interpreter
                self._threads += 1

    def _serve(self, invitations: SimpleQueue[Callable[..., None]]) -> None:
        try:
            while True:
                invitations.get()(True)
        finally:
            with self._lock:
                self._threads -= 1


_POOL = _Pool()


def _after_fork() -> None:
    _POOL.reset()
    loop = getattr(_LOCAL, "loop", None)
    if loop is not None:
        loop.abandon_helpers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

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
    """Call ``kernel(*args, *scratch(), begin, end)`` on all threads, for ranges of at least `least` items.

    If a piece raises an exception, no further pieces are begun, and the exception is raised here after the end of the
    others.
    """
    is_small = getattr(_LOCAL, "serial", False)
    threads = 1 if is_small else threads_of_call()
    size = max(least, items if is_small else -(-items // (threads * pieces_per_thread)))
    helpers = min(threads, -(-items // size)) - 1
    if helpers > 0:
        _Loop(kernel, args, scratch, items, size).run(helpers)
    elif items:
        buffers = scratch()
        for begin in range(0, items, size):
            kernel(*args, *buffers, begin, min(begin + size, items))


def parallel_jobs(*jobs: tuple[Any, ...]) -> None:
    """Call `parallel` for independent loops ``(kernel, items, *args)`` at once, so that threads are woken only once.

    A piece is a part of every loop.
    """
    pieces = threads_of_call() * PIECES_PER_THREAD

    def run(begin: int, end: int) -> None:
        for kernel, items, *args in jobs:
            low, high = items * begin // pieces, items * end // pieces
            if low < high:
                kernel(*args, low, high)

    parallel(run, pieces if any(items for _, items, *_ in jobs) else 0)
