"""Tensors as arrays and back, without a copy: NumPy on the CPU, CuPy on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

__all__ = ["as_array", "as_tensor", "on_device_of"]


def as_array(tensor: Tensor | None) -> Any:
    """A NumPy or CuPy array that shares the tensor's memory; None for None."""
    if tensor is None:
        return None
    if tensor.device.type == "cpu":
        if tensor.dtype == torch.bfloat16:
            import ml_dtypes

            # NumPy takes bfloat16 neither from DLPack nor from the buffer protocol.
            return tensor.detach().view(torch.int16).numpy(force=True).view(ml_dtypes.bfloat16)
        return tensor.numpy(force=True)
    import cupy

    return cupy.from_dlpack(tensor.detach())


def as_tensor(array: Any) -> Tensor:
    """A tensor that shares the memory of a C-contiguous array; the array's memory lives as long as the tensor."""
    if type(array).__module__.startswith("numpy"):
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array)


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """On a GPU, CuPy works on the tensor's device and torch's current stream, and allocates from torch's memory."""
    if tensor.device.type == "cpu":
        yield
        return
    import cupy

    index = tensor.device.index
    stream = cupy.cuda.Stream.from_external(_Stream(torch.cuda.current_stream(index).cuda_stream))
    with torch.cuda.device(index), cupy.cuda.Device(index), cupy.cuda.using_allocator(_torch_memory()), stream:
        yield


class _Stream:
    """A stream by CUDA's protocol, which not every torch has."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


@cache
def _torch_memory() -> Any:
    """CuPy's malloc over torch's caching allocator: one pool for both, whose memory follows streams and graphs."""
    import cupy

    def malloc(size: int, device: int) -> int:
        return int(torch.cuda.caching_allocator_alloc(size, device, torch.cuda.current_stream(device)))

    def free(pointer: int, device: int) -> None:
        torch.cuda.caching_allocator_delete(pointer)

    return cupy.cuda.PythonFunctionAllocator(malloc, free).malloc
