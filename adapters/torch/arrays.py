"""Conversion between tensors and arrays without a copy: NumPy on the CPU, CuPy on a GPU."""

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
    """Return a NumPy or CuPy array that shares the tensor's memory; None for None."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        # Pass integers: NumPy and some versions of CuPy do not accept bfloat16 through DLPack.
        return as_array(tensor.detach().view(torch.int16)).view(ml_dtypes.bfloat16)
    if tensor.device.type == "cpu":
        return tensor.numpy(force=True)
    import cupy

    # A plain capsule suffices: torch and CuPy use the same stream, so `Tensor.__dlpack__` need not synchronise.
    return cupy.from_dlpack(torch.utils.dlpack.to_dlpack(tensor))  # type: ignore[attr-defined]


def as_tensor(array: Any) -> Tensor:
    """Return a tensor that shares the array's memory and keeps it alive. Strides must not be negative."""
    if array.dtype.name == "bfloat16":
        return as_tensor(array.view("int16")).view(torch.bfloat16)
    if type(array).__module__.startswith("numpy"):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array.__dlpack__(stream=-1))


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Make CuPy use the tensor's device, torch's current stream and torch's memory; do nothing on a CPU."""
    if tensor.device.type == "cpu":
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
