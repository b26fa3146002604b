"""How the loops of the CPU backend are compiled: without the GIL, cached on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["exact", "inner", "kernel"]

Function = TypeVar("Function", bound=Callable[..., Any])


def _options(fastmath: set[str]) -> dict[str, Any]:
    # Nothing is allocated in these loops. Without reference counts (_nrt), a slice costs no atomic operation.
    return {"nogil": True, "error_model": "numpy", "_nrt": False, "fastmath": fastmath}


def kernel(function: Function) -> Function:
    """A function that is called from Python. It is compiled on its first call, once for each user and machine.

    Numba looks for changes in the file of the cached function only, not in those of the functions that it calls.
    """
    try:
        return cast(Function, numba.njit(cache=True, **_options({"contract"}))(function))
    except RuntimeError:
        # Neither the package's folder nor the user's cache folder can be written to.
        return cast(Function, numba.njit(**_options({"contract"}))(function))


def inner(*fastmath: str) -> Callable[[Function], Function]:
    """A function that kernels of the same file call, with LLVM's `fastmath` flags beside contract."""
    return cast(Callable[[Function], Function], numba.njit(**_options({"contract", *fastmath})))


def exact(function: Function) -> Function:
    """A function that kernels of the same file call, every operation of which is rounded: coordinates.

    Contracted to a fused multiply-add, a position could fall on the other side of a kink than it does elsewhere.
    """
    return cast(Function, numba.njit(**_options(set()))(function))
