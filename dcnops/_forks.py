"""Locks that are free in a child process, whatever other threads were doing when it was forked."""

from __future__ import annotations

import contextlib
import logging  # noqa: F401
import os
import threading
from collections.abc import Iterator
from typing import Protocol


class Lock(Protocol):
    """Reentrant lock."""

    def acquire(self) -> object: ...
    def release(self) -> object: ...


_IMPORTS = threading.RLock()
_LOCKS: list[Lock] = [_IMPORTS]


@contextlib.contextmanager
def no_fork() -> Iterator[None]:
    """Delay forks until the end of the context.

    A child that is forked while another thread imports a module waits forever for that thread when it imports the same.
    """
    with _IMPORTS:
        yield


def hold_in_forks(lock: Lock) -> None:
    """Acquire a lock before each fork and release it afterwards, in the parent and in the child.

    A thread that owns this lock must not import a backend.
    """
    _LOCKS.append(lock)


def _before() -> None:
    # Locks that are added while this waits for the first one are acquired as well.
    for lock in _LOCKS:
        lock.acquire()


def _after() -> None:
    for lock in reversed(_LOCKS):
        lock.release()


if hasattr(os, "register_at_fork"):
    # The last registered function is the first to run before a fork. This one must wait before logging acquires its
    # lock, which the other thread may need; hence the import of logging.
    os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
