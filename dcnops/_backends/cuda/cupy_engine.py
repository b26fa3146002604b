"""Engine that runs launch plans on CuPy arrays, on the current GPU and stream."""

from __future__ import annotations

import ctypes
import functools

import cupy

from dcnops._backends.cuda.cublas import CublasSession, matmul
from dcnops._backends.cuda.engine import Device, Engine, Launcher
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
    allowed_bytes = _DEFAULT_SHARED_BYTES
    as_argument, address = cupy.cuda.function.CPointer, ctypes.addressof

    def launch(grid: int, block: tuple[int, int], shared_bytes: int, params: ctypes.Structure) -> None:
        nonlocal allowed_bytes
        if shared_bytes > allowed_bytes:
            raw.max_dynamic_shared_size_bytes = allowed_bytes = shared_bytes
        function((grid,), block, (as_argument(address(params)),), shared_mem=shared_bytes)

    return launch


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


ENGINE = Engine(cupy, _compile, matmul, _current_device, _pointer, CublasSession)
