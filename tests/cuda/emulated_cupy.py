"""CUDA backend without a GPU: arrays that the library takes for CuPy arrays, and emulated kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from dcnops._backends.cuda import backend as cuda
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolPrograms
from dcnops._backends.cuda.programs import ProgramCache
from tests.cases import Case
from tests.cuda.emulator import HostArrays, host_engine
from tests.cuda.emulator.host_engine import prepare_program, prepare_roi_pool_program


class _Device:
    id = 0

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class ndarray(np.ndarray):
    """Array that the library takes for a CuPy array."""

    device = _Device()  # type: ignore[assignment]


ndarray.__module__ = "cupy"


class StandIn(HostArrays):
    """Replacement of module `cupy` in the CUDA backend. Counts copies."""

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
    """Make the public functions run the CUDA backend on the host engine, with arrays of this module."""
    stand_in, engine = StandIn(), host_engine(**engine_options)
    caches = {
        "PROGRAMS": ProgramCache(engine, prepare_program),
        "ROI_POOL_PROGRAMS": RoIPoolPrograms(engine, prepare_roi_pool_program),
    }
    with mock.patch.multiple(cuda, cupy=stand_in, ENGINE=engine, **caches):
        yield stand_in


def cupy_arguments(stand_in: StandIn, case: Case) -> dict[str, Any]:
    """Return the arguments of a case, with its arrays and their strides on the device of the stand-in."""
    return {
        name: _moved(stand_in, value) if isinstance(value, np.ndarray) else value
        for name, value in {**case.arguments(), "grad_out": case.grad_out}.items()
    }


def _moved(stand_in: StandIn, array: np.ndarray) -> Any:
    """Copy like CuPy: a dense array keeps its memory order."""
    order = np.argsort([-stride for stride in array.strides], kind="stable")
    return stand_in.asarray(array.transpose(order)).transpose(np.argsort(order))
