"""Tensors as arrays and back, without a copy: NumPy on the CPU, CuPy on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from ..cuda_stream import CudaStream


def as_array(tensor: Tensor | None) -> Any:
    """A NumPy or CuPy array that shares the tensor's memory; None for None."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        # As integers: NumPy takes bfloat16 neither from DLPack nor from the buffer protocol, nor does every CuPy.
        return as_array(tensor.detach().view(torch.int16)).view(ml_dtypes.bfloat16)
    if tensor.device.type == "cpu":
        return tensor.numpy(force=True)
    import cupy

    # A capsule: torch and CuPy are on the same stream, so that what `Tensor.__dlpack__` sees to is not needed.
    return cupy.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))  # type: ignore[attr-defined]


def as_tensor(array: Any) -> Tensor:
    """A tensor that shares the memory of an array without negative strides, and keeps it alive."""
    if array.dtype.name == "bfloat16":
        return as_tensor(array.view("int16")).view(torch.bfloat16)
    if type(array).__module__.startswith("numpy"):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array.__dlpack__(stream=-1))


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """On a GPU, CuPy works on the tensor's device and torch's current stream, and allocates from torch's memory."""
    if tensor.device.type == "cpu":
        yield
        return
    import cupy

    index = tensor.device.index
    # In this order: a stream belongs to the device that is current where it is made.
    with (
        torch.cuda.device(index),
        cupy.cuda.Device(index),
        cupy.cuda.using_allocator(_torch_memory(index)),
        cupy.cuda.Stream.from_external(CudaStream(torch.cuda.current_stream(index).cuda_stream)),
    ):
        yield


@cache
def _torch_memory(index: int) -> Callable[[int], Any]:
    """CuPy's allocator over torch's: one pool for both, whose memory follows streams and graphs."""
    from cupy.cuda import MemoryPointer, UnownedMemory

    device = torch.device("cuda", index)

    def allocate(size: int) -> Any:
        # A storage, as a tensor would be filled where torch is told to be deterministic.
        storage = torch.UntypedStorage(size, device=device)
        return MemoryPointer(UnownedMemory(storage.data_ptr(), size, storage, index), 0)

    return allocate
