"""How the loops of the CPU backend are compiled: without the GIL, cached on disk."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])


def _options(fastmath: set[str]) -> dict[str, Any]:
    # Nothing is allocated in these loops. Without reference counts (_nrt), a slice costs no atomic operation.
    return {"nogil": True, "error_model": "numpy", "_nrt": False, "fastmath": fastmath}


def kernel(function: Function) -> Function:
    """A function that is called from Python. It is compiled on its first call, once for each user and machine.

    Numba looks for changes in the file of the cached function only, not in those of the functions that it calls.
    """
    dispatcher = numba.njit(**_options({"contract"}))(function)
    try:
        dispatcher._cache = _Cache(function)  # what njit(cache=True) does with Numba's own class
    except RuntimeError:
        _warn("neither the package's folder nor the user's cache folder can be written to")
    return cast(Function, dispatcher)


class _Cache(FunctionCache):  # type: ignore[misc]
    """Numba's cache on disk; damaged files count as missing, and what cannot be written only costs time."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling raises nearly everything
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn(f"{error.filename or self.cache_path}: {error.strerror}")


@functools.cache
def _warn(reason: str) -> None:
    """Say once that compiled code is lost."""
    warnings.warn(
        f"dcnops cannot keep its compiled CPU code, every process will spend seconds on it: {reason}; "
        "set NUMBA_CACHE_DIR to a folder that can be written to",
        stacklevel=2,
    )


def inner(*fastmath: str) -> Callable[[Function], Function]:
    """A function that kernels of the same file call, with LLVM's `fastmath` flags beside contract."""
    return cast(Callable[[Function], Function], numba.njit(**_options({"contract", *fastmath})))


def exact(function: Function) -> Function:
    """A function that kernels of the same file call, every operation of which is rounded: coordinates.

    Contracted to a fused multiply-add, a position could fall on the other side of a kink than it does elsewhere.
    """
    return cast(Function, numba.njit(**_options(set()))(function))
