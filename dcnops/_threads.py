"""Number of threads of the CPU backend."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from pathlib import Path

from dcnops._arguments import as_integer, shown
from dcnops._errors import ArgumentError

MAX_THREADS = 1024

_VARIABLES = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")


class _Local(threading.local):
    threads = 0


_LOCAL = _Local()


class _Setting:
    """Number that `set_num_threads` sets, 0 for the default."""

    threads = 0


def set_num_threads(n: int) -> None:
    """Set the number of threads that a call on NumPy or JAX arrays uses, for the whole process.

    Parameters
    ----------
    n : int
        From 1 to 1024, including the thread that makes the call.

    Raises
    ------
    ArgumentError
        `n` is not such a number.

    Notes
    -----
    The functions and layers for PyTorch tensors follow `torch.set_num_threads` instead. Results do not depend on the
    number of threads.

    Examples
    --------
    >>> import dcnops
    >>> before = dcnops.get_num_threads()
    >>> dcnops.set_num_threads(1)
    >>> dcnops.get_num_threads()
    1
    >>> dcnops.set_num_threads(before)
    """
    number = as_integer(n)
    if number is None or not 1 <= number <= MAX_THREADS:
        raise ArgumentError(f"n must be an integer from 1 to {MAX_THREADS}, got {shown(n)}")
    _Setting.threads = number


def get_num_threads() -> int:
    """Return the number of threads that a call on NumPy or JAX arrays uses.

    Returns
    -------
    int
        The number that `set_num_threads` has set. By default, it is the smallest of the number of cores that this
        process may run on, the CPU quota of its control group (container), and the environment variables
        OMP_NUM_THREADS and NUMBA_NUM_THREADS, as they were at the first call of the process.

    Examples
    --------
    >>> import dcnops
    >>> dcnops.get_num_threads() >= 1
    True
    """
    return _Setting.threads or _default()


def threads_of_call() -> int:
    """Return the number of threads for the current call."""
    return _LOCAL.threads or get_num_threads()


class call_threads:  # lower case like the context managers of contextlib
    """Use `n` threads for the calls that this thread makes in the context."""

    def __init__(self, n: int) -> None:
        self._n, self._before = n, 0

    def __enter__(self) -> None:
        self._before, _LOCAL.threads = _LOCAL.threads, self._n

    def __exit__(self, *error: object) -> None:
        _LOCAL.threads = self._before


@functools.cache
def _default() -> int:
    limits = [_available_cores(), MAX_THREADS, *map(_variable, _VARIABLES), _quota(Path("/"))]
    return max(1, min(limit for limit in limits if limit))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_default.cache_clear)  # the child may be moved to other cores


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _variable(name: str) -> int:
    """Return the number in an environment variable such as "4" or "4,2" (nested regions), 0 without one."""
    first = os.environ.get(name, "").partition(",")[0].strip()
    return int(first) if first.isascii() and first.isdigit() else 0


def _quota(root: Path) -> int:
    """Return the cores that the control groups of this process grant, 0 without a limit."""
    quotas = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        mounts = root / "sys/fs/cgroup"
        if controllers:  # version 1
            if "cpu" not in controllers.split(","):
                continue
            mounts /= "cpu"
        # A parent limits its children. In a container only the root of the hierarchy may be visible.
        folder = mounts / group.lstrip("/")
        while mounts in (folder, *folder.parents):
            if controllers:
                numbers = [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                numbers = _text(folder / "cpu.max").split()
            with contextlib.suppress(ValueError):  # "max"
                quota, period = map(int, numbers)
                if quota > 0 and period > 0:
                    quotas.append(math.ceil(quota / period))
            folder = folder.parent
    return min(quotas, default=0)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
