"""Functions that run in other processes, and results in memory that processes share."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import pickle
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, NoReturn, TypeVar

from .errors import UserError

T = TypeVar("T")
END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux
CAN_COPY = sys.platform == "linux"  # on macOS, a copy of a process with threads may crash
ALIGNMENT = 64  # bytes, of arrays in a file

Spans = list[tuple[int, int]]  # start and end of the parts of a file


@contextmanager
def in_background(make: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Call `make` in a copy of this process, and yield a function that waits for its result.

    The function raises the `UserError` or `OSError` of `make`. The memory that `make` needs on the way does not add to
    the memory of this process, nor do arrays of the result until they are used. At the end of the context, the other
    process is ended, and also if this process ends. Without `CAN_COPY`, the function is `make`.
    """
    if not CAN_COPY:
        yield make
        return
    with packed_in_background(make) as result:

        def value() -> T:
            spans, file = result()
            return unpack(spans, map_file(file))

        yield value


@contextmanager
def packed_in_background(make: Callable[[], object]) -> Iterator[Callable[[], tuple[Spans, BinaryIO]]]:
    """Like `in_background`, but the result stays packed in a file, see `pack`.

    Without `CAN_COPY`, or if the system allows no more processes, `make` runs in this process.
    """
    with _nameless_file() as file:
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
            yield lambda: (pack(make, file), file)
            return
        if process == 0:
            os.close(source)
            _run(make, file, sink, parent)
        os.close(sink)

        def result() -> tuple[Spans, BinaryIO]:
            try:
                return pickle.load(pipe), file
            except (EOFError, pickle.UnpicklingError):
                return pack(_report_end, file), file

        with open(source, "rb") as pipe:
            try:
                yield result
            finally:
                # If SIGCHLD is ignored, there may be nothing left.
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)


def pack(make: Callable[[], object], file: BinaryIO) -> Spans:
    """Write the result of `make`, or its `UserError` or `OSError`, to a file.

    The parts of the file are the contents of arrays, and at last a pickle without them.
    """
    value: object
    try:
        value = make()
    except (UserError, OSError) as error:
        value = error
    spans: Spans = []

    def write(part: bytes | memoryview) -> None:
        start = file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
        spans.append((start, start + file.write(part)))

    def stays(item: pickle.PickleBuffer) -> bool:
        memory = item.raw()
        if memory.readonly or not memory.nbytes:
            return True
        write(memory)
        return False

    file.seek(0)
    write(pickle.dumps(value, protocol=5, buffer_callback=stays))
    file.flush()
    return spans


def unpack(spans: Spans, memory: mmap.mmap | bytearray) -> Any:
    """Return the value of `pack`, with arrays in `memory`, or raise the error."""
    *arrays, pickled = (memoryview(memory)[start:end] for start, end in spans)
    value = pickle.loads(pickled, buffers=arrays)
    if isinstance(value, (UserError, OSError)):
        raise value
    return value


def map_file(file: BinaryIO) -> mmap.mmap:
    """Map a file into memory. Pages that are not changed are shared by all processes that map it."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def link_to(file: BinaryIO) -> tuple[str, str] | None:
    """Return a path by which other processes of this machine find an open file, and the target of this link."""
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
    with contextlib.suppress(OSError):
        return path, os.readlink(path)
    return None


def map_link(link: tuple[str, str] | None) -> mmap.mmap | None:
    """Map the file of `link_to`; None on another machine."""
    if link:
        with contextlib.suppress(OSError):
            if os.readlink(link[0]) == link[1]:
                with open(link[0], "rb") as file:
                    return map_file(file)
    return None


def _nameless_file() -> BinaryIO:
    """Open a file that exists until it is closed by all processes; on Linux, in memory if possible."""
    with contextlib.suppress(AttributeError, OSError):  # some builds of Python for Linux and some sandboxes lack it
        return open(os.memfd_create(uuid.uuid4().hex), "w+b")  # the name is in `link_to`
    return tempfile.TemporaryFile()


def _run(make: Callable[[], object], file: BinaryIO, sink: int, parent: int) -> NoReturn:
    """Pack the result of `make`, write the spans to a pipe and end this process."""
    try:
        ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended already
            os._exit(0)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in background jobs of scripts
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the first process to report
        gc.disable()  # it would copy the memory that both processes share, and data have no cycles
        spans = pack(make, file)
        with contextlib.suppress(BrokenPipeError), open(sink, "wb") as pipe:  # the first process may have ended
            pickle.dump(spans, pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _report_end() -> NoReturn:
    raise UserError("a process that reads the data ended; if there is no other message, give the program more memory")
