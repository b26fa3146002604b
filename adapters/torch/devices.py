"""Devices that the operators support, and the context in which the backends follow torch on one of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolPrograms
from dcnops._backends.cuda.programs import ProgramCache
from dcnops._errors import DeviceError
from dcnops._threads import call_threads

from ..cuda_stream import CudaStream

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}
"""Dispatch key of the operators by type of device."""


def check_device(name: str, tensor: Tensor) -> None:
    """Check that a tensor is on a device of the operators; the meta device serves tracing."""
    if tensor.device.type not in DEVICES and tensor.device.type != "meta":
        raise DeviceError(f"{name} must be on a CPU or a CUDA GPU, got {tensor.device}")


def is_autocast_enabled(device: torch.device) -> bool:
    """Check for autocast on a device of the operators."""
    return device.type in DEVICES and torch.is_autocast_enabled(device.type)


def is_on_current_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.get_device() == torch._C._cuda_getDevice()


def current_stream(index: int) -> int:
    """Return the handle of the current stream of a GPU."""
    return torch._C._cuda_getCurrentRawStream(index)


def recorded_programs() -> ProgramCache:
    """Return the programs of the CUDA backend; the first call imports CuPy."""
    from dcnops._backends.cuda.cupy_engine import PROGRAMS

    return PROGRAMS


def roi_pool_programs() -> RoIPoolPrograms:
    """Return the prepared calls of RoI pooling of the CUDA backend; the first call imports CuPy."""
    from dcnops._backends.cuda.cupy_engine import ROI_POOL_PROGRAMS

    return ROI_POOL_PROGRAMS


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Follow torch: on a GPU its device, current stream and memory, on a CPU its number of threads."""
    if tensor.device.type == "cpu":
        with call_threads(torch.get_num_threads()):
            yield
        return
    import cupy

    index = tensor.device.index
    # The order matters: a stream belongs to the device that is current when it is created.
    with (
        torch.cuda.device(index),
        cupy.cuda.Device(index),
        cupy.cuda.using_allocator(_torch_memory(index)),
        cupy.cuda.Stream.from_external(CudaStream(torch.cuda.current_stream(index).cuda_stream)),
    ):
        yield


@cache
def _torch_memory(index: int) -> Callable[[int], Any]:
    """Return a CuPy allocator on top of torch's, so that both share one pool that respects streams and graphs."""
    from cupy.cuda import MemoryPointer, UnownedMemory

    device = torch.device("cuda", index)

    def allocate(size: int) -> Any:
        # Not a tensor: with deterministic algorithms enabled, torch fills the memory of new tensors.
        storage = torch.UntypedStorage(size, device=device)
        return MemoryPointer(UnownedMemory(storage.data_ptr(), size, storage, index), 0)

    return allocate
