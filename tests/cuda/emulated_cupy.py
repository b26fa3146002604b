"""The CUDA backend without a GPU: arrays that the library takes for CuPy's, and the kernels under emulation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from dcnops._backends.cuda import backend as cuda
from tests.cases import Case
from tests.cuda.emulator import HostArrays, host_engine


class _Device:
    id = 0

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class ndarray(np.ndarray):
    """What CuPy's class of this name is to the library."""

    device = _Device()  # type: ignore[assignment]


ndarray.__module__ = "cupy"


class StandIn(HostArrays):
    """Stands for the module `cupy` in the CUDA backend and counts the copies that it is asked for."""

    def __init__(self) -> None:
        self.copies = 0

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        return super().asarray(array, dtype).view(ndarray)

    def ascontiguousarray(self, array: Any, dtype: Any = None) -> Any:
        result = super().ascontiguousarray(array, dtype)
        self.copies += not np.shares_memory(result, array) and result.size > 0
        return result.view(ndarray)


@contextmanager
def emulated_cupy(**engine_options: Any) -> Iterator[StandIn]:
    """Within, the public functions take arrays of this module and run the shipped CUDA backend on the host engine."""
    stand_in = StandIn()
    with mock.patch.object(cuda, "cupy", stand_in), mock.patch.object(cuda, "ENGINE", host_engine(**engine_options)):
        yield stand_in


def cupy_arguments(stand_in: StandIn, case: Case) -> dict[str, Any]:
    """The arguments of a case, its arrays on the stand-in's device with the strides they have."""
    return {
        name: _moved(stand_in, value) if isinstance(value, np.ndarray) else value
        for name, value in {**case.arguments(), "grad_out": case.grad_out}.items()
    }


def _moved(stand_in: StandIn, array: np.ndarray) -> Any:
    """As CuPy copies to a GPU: in the memory order of the array where that is dense."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    return stand_in.asarray(array.transpose(order)).transpose(np.argsort(order))
