"""Engine that runs launch plans on CuPy arrays, on the current GPU and stream."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import cupy

from dcnops._backends.cuda.cublas import CublasSession, matmul
from dcnops._backends.cuda.cupy_programs import CupyProgram, CupyRoIPoolProgram
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolPrograms
from dcnops._backends.cuda.engine import Device, Engine, Launcher
from dcnops._backends.cuda.programs import ProgramCache
from dcnops._errors import KernelCompileError

_DEFAULT_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that a kernel may use without asking for more."""


def _compile(source: str, kernel: str, options: tuple[str, ...]) -> Launcher:
    try:
        raw = cupy.RawModule(code=source, options=options).get_function(kernel)
        # The function on the current device: the engine keeps one launcher per device.
        function = raw.kernel
    except cupy.cuda.compiler.CompileException as error:
        raise KernelCompileError(f"{kernel} must compile, got from NVRTC:\n{error}") from error
    return _CupyKernel(raw, function)


class _CupyKernel:
    """Launcher of a kernel that CuPy has loaded on one device."""

    def __init__(self, raw: Any, function: Any) -> None:
        self._raw, self._function = raw, function
        self._allowed_bytes = _DEFAULT_SHARED_BYTES

    def __call__(self, grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
        self._allow(shared_bytes)
        argument = cupy.cuda.function.CPointer(ctypes.addressof(params))
        self._function((grid,), block, (argument,), shared_mem=shared_bytes)

    def function(self, shared_bytes: int) -> int:
        """Return the driver's handle of the kernel, which may then use `shared_bytes` of dynamic shared memory."""
        self._allow(shared_bytes)
        return int(self._function.ptr)

    def _allow(self, shared_bytes: int) -> None:
        if shared_bytes > self._allowed_bytes:
            self._raw.max_dynamic_shared_size_bytes = self._allowed_bytes = shared_bytes


def _current_device() -> Device:
    return _describe(int(cupy.cuda.runtime.getDevice()))


@functools.cache
def _describe(index: int) -> Device:
    device = cupy.cuda.Device(index)
    return Device(
        index,
        int(device.compute_capability),
        int(device.attributes["MultiProcessorCount"]),
        int(device.attributes["MaxSharedMemoryPerBlockOptin"]),
    )


def _pointer(array: cupy.ndarray) -> int:
    return int(array.data.ptr)


def _current_stream() -> int:
    return int(cupy.cuda.get_current_stream().ptr)


ENGINE = Engine(cupy, _compile, matmul, _current_device, _pointer, CublasSession)
PROGRAMS = ProgramCache(ENGINE, CupyProgram, _current_stream)
ROI_POOL_PROGRAMS = RoIPoolPrograms(ENGINE, CupyRoIPoolProgram, _current_stream)
