"""Numba decorators for the loops of the CPU backend: without the GIL, cached on disk."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.ma  # otherwise Numba imports it at the first call, during which a fork may come
from llvmlite import ir
from numba.core import types
from numba.core.caching import FunctionCache
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from dcnops._explain import LOGGER
from dcnops._forks import hold_in_forks

try:
    from dcnops._backends.cpu.numba_compiler import InnerCompiler, KernelCompiler, VectorCompiler
except ImportError:  # this version of Numba lacks a name
    from numba.core.compiler import Compiler

    InnerCompiler = KernelCompiler = VectorCompiler = Compiler  # type: ignore[misc]

Function = TypeVar("Function", bound=Callable[..., Any])

# A process that is forked while another thread compiles could never compile anything itself.
hold_in_forks(global_compiler_lock)


def _import_array_functions() -> None:
    """Import Numba's array functions without SciPy, which would take a third of the first call of a process.

    They only check whether SciPy is installed, and import it when a matrix product is compiled.
    """
    try:
        from numba.np import linalg

        import_blas = linalg.ensure_blas
    except (ImportError, AttributeError):  # this version of Numba does it in another way
        return

    def find_scipy() -> None:
        if importlib.util.find_spec("scipy") is None:
            raise ImportError

    linalg.ensure_blas = find_scipy
    try:
        from numba.np import arraymath
    finally:
        linalg.ensure_blas = import_blas
    arraymath.ensure_blas = import_blas


_import_array_functions()

_ANNOUNCE_SECONDS = 1.0
CACHE_LINE = 64  # bytes

INTERPRETED: bool = bool(numba.config.DISABLE_JIT)
"""True if NUMBA_DISABLE_JIT is set: the loops run as Python functions."""


def quiet(function: Function) -> Function:
    """Let a function compute infinities and NaN without NumPy's warnings, whatever `np.seterr` says."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return cast(Function, call)


def _options(fastmath: set[str]) -> dict[str, Any]:
    # These loops allocate nothing. Without reference counts (_nrt), slicing needs no atomic operations.
    # A wrapper for C would take as long to compile as a short loop.
    return {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True, "fastmath": fastmath}


def kernel(function: Function) -> Function:
    """Compile a function that Python calls, at its first call, and cache the code on disk.

    Numba recompiles a cached function if its own file changes, but not if the file of a function that it calls changes.
    """
    return _kernel(function, KernelCompiler)


def vector_kernel(function: Function) -> Function:
    """Compile a function like `kernel`, but faster, if the loops that take its time are functions of `vectors`."""
    return _kernel(function, VectorCompiler)


def _kernel(function: Function, compiler: type[Any]) -> Function:
    if INTERPRETED:
        return quiet(function)
    dispatcher = numba.njit(**_options({"contract"}), pipeline_class=compiler)(function)
    try:
        dispatcher._cache = _Cache(function)  # like njit(cache=True), which uses Numba's own class
    except RuntimeError:
        _warn("neither the package's folder nor the user's cache folder can be written to")
    return cast(Function, dispatcher)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Disk cache of Numba that ignores corrupted files and survives write errors with a warning.

    Numba holds its compiler lock from `load_overload` to `save_overload`. A compilation in between is announced if it
    takes long.
    """

    _announcement: threading.Timer | None = None

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        overload = None
        try:
            overload = super().load_overload(sig, target_context)
        except Exception:  # unpickling can raise almost any exception
            with contextlib.suppress(OSError):
                self.flush()
        if overload is None:
            self._announcement = threading.Timer(_ANNOUNCE_SECONDS, _announce, [self.cache_path])
            self._announcement.daemon = True
            with contextlib.suppress(RuntimeError):  # a limit on the number of threads
                self._announcement.start()
        return overload

    def save_overload(self, sig: Any, data: Any) -> None:
        if self._announcement is not None:
            self._announcement.cancel()
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"{error.filename or self.cache_path}: {error.strerror}")


@functools.cache
def _announce(folder: str) -> None:
    """Log once per folder that a call compiles."""
    LOGGER.info("compiling loops for the CPU, which takes seconds; later processes find the code in %s", folder)


@functools.cache
def _warn(reason: str) -> None:
    """Warn once that compiled code is not kept."""
    warnings.warn(
        f"dcnops cannot keep its compiled CPU code, every process will spend seconds on it: {reason}; "
        "set NUMBA_CACHE_DIR to a folder that can be written to",
        stacklevel=2,
    )


def inner(*fastmath: str) -> Callable[[Function], Function]:
    """Return a decorator for functions that kernels of the same file call, with `fastmath` flags beyond "contract"."""
    return functools.partial(_inner, fastmath={"contract", *fastmath})


def _inner(function: Function, fastmath: set[str]) -> Function:
    options = {**_options(fastmath), "no_cpython_wrapper": True}
    return cast(Function, numba.njit(**options, pipeline_class=InnerCompiler)(function))


def exact(function: Function) -> Function:
    """Compile a function that kernels of the same file call without fused multiply-adds.

    Coordinates need this: contraction could move a position to the other side of a kink.
    """
    return _inner(function, set())


@intrinsic  # type: ignore[untyped-decorator]
def smaller(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the smaller integer. Numba compiles `min` as a function, again for each combination of types."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = args
        return builder.select(builder.icmp_signed("<", a, b), a, b)

    return types.intp(types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def larger(typing_context: Any, a: Any, b: Any) -> Any:
    """Return the larger integer, like `smaller`."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b = args
        return builder.select(builder.icmp_signed(">", a, b), a, b)

    return types.intp(types.intp, types.intp), generate


def generate_prefetch(builder: Any, pointer: Any) -> None:
    """Generate code that begins to load a cache line. The address may be invalid."""
    address = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    integer = ir.IntType(32)
    function_type = ir.FunctionType(ir.VoidType(), [address.type, integer, integer, integer])
    function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], function_type)
    read, into_all_caches, data_cache = integer(0), integer(3), integer(1)
    builder.call(function, [address, read, into_all_caches, data_cache])


@intrinsic  # type: ignore[untyped-decorator]
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        generate_prefetch(builder, builder.gep(data, [args[1]]))
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@inner()
def prefetch(array: Any, first: int, count: int) -> None:
    """Begin to load `count` elements of a C-contiguous array, which a loop will read at addresses known late."""
    for i in range(first, first + count, CACHE_LINE // array.itemsize):
        _prefetch(array, i)


if INTERPRETED:
    smaller, larger = min, max

    def prefetch(array: Any, first: int, count: int) -> None:
        """Do nothing."""
