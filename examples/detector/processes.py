"""Functions that run in other processes, and pickles for sending large objects."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn, TypeVar

from .errors import UserError

T = TypeVar("T")
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
CAN_COPY = sys.platform == "linux"  # on macOS, a copy of a process with threads may crash


def pack(value: object) -> tuple[bytes, list[memoryview]]:
    """Return a pickle that leaves out the contents of arrays, and these contents, which are not copied."""
    arrays: list[memoryview] = []

    def stays(item: pickle.PickleBuffer) -> bool:
        memory = item.raw()
        if memory.readonly or not memory.nbytes:
            return True
        arrays.append(memory)
        return False

    return pickle.dumps(value, protocol=5, buffer_callback=stays), arrays


@contextmanager
def in_background(make: Callable[[], T], niceness: int = 0) -> Iterator[Callable[[], T]]:
    """Call `make` in a copy of this process, and yield a function that waits for its result.

    The function raises the `UserError` or `OSError` of `make`. The memory that `make` needs on the way does not add to
    the memory of this process. At the end of the context, the other process is ended, and also if this process ends.
    Without `CAN_COPY`, or if the system allows no more processes, the function is `make`.
    """
    process = None
    if CAN_COPY:
        source, sink = os.pipe()
        parent = os.getpid()
        try:
            process = os.fork()
        except OSError:
            os.close(source)
            os.close(sink)
    if process is None:
        yield make
        return
    if process == 0:
        _send(make, source, sink, niceness, parent)
    os.close(sink)
    with open(source, "rb") as file:
        try:
            yield lambda: _receive(file)
        finally:
            # If SIGCHLD is ignored, there may be nothing left.
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)


def _send(make: Callable[[], object], source: int, sink: int, niceness: int, parent: int) -> NoReturn:
    """Write the result of `make` to a pipe and end this process."""
    try:
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(0)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in background jobs of scripts
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the first process to report
        gc.disable()  # it would copy the memory that both processes share, and data have no cycles
        os.close(source)
        os.nice(niceness)
        value: object
        try:
            value = make()
        except (UserError, OSError) as error:
            value = error
        pickled, arrays = pack(value)
        with contextlib.suppress(BrokenPipeError), open(sink, "wb") as file:  # the first process may have ended
            pickle.dump((pickled, [array.nbytes for array in arrays]), file)
            for array in arrays:
                file.write(array)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _receive(file: BinaryIO) -> Any:
    try:
        pickled, sizes = pickle.load(file)
        arrays = [bytearray(size) for size in sizes]
        complete = [file.readinto(array) for array in arrays] == sizes  # type: ignore[attr-defined]
    except (EOFError, pickle.UnpicklingError):
        complete = False
    if not complete:
        raise UserError(
            "a process that reads the data ended; if there is no other message, give the program more memory"
        )
    value = pickle.loads(pickled, buffers=arrays)
    if isinstance(value, (UserError, OSError)):
        raise value
    return value
