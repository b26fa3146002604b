"""Conversion between tensors and arrays without a copy: NumPy on the CPU, CuPy on a GPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor

from .. import name_extra

_to_capsule = torch._C._to_dlpack
_from_capsule = torch._C._from_dlpack


@cache
def _bfloat16() -> Any:
    """Return NumPy's data type. Imported here because only bfloat16 needs ml_dtypes."""
    with name_extra("torch", "ml_dtypes"):
        import ml_dtypes
    return ml_dtypes.bfloat16


def as_array(tensor: Tensor | None) -> Any:
    """Return a NumPy or CuPy array that shares the tensor's memory; None for None."""
    if tensor is None:
        return None
    if tensor.dtype == torch.bfloat16:
        # Pass integers: NumPy and some versions of CuPy do not accept bfloat16 through DLPack.
        return as_array(tensor.detach().view(torch.int16)).view(_bfloat16())
    if tensor.device.type == "cpu":
        # An alias, because `Tensor.numpy` forbids for good to resize the storage, which is how FSDP frees parameters.
        return _from_capsule(_to_capsule(tensor.resolve_neg())).numpy()
    import cupy

    # A plain capsule suffices: torch and CuPy use the same stream, so `Tensor.__dlpack__` need not synchronise.
    return cupy.from_dlpack(_to_capsule(tensor))


def coordinate_dtype(input: Tensor) -> torch.dtype:
    """Return the dtype in which regions of `input` are computed."""
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def as_tensor(array: Any) -> Tensor:
    """Return a tensor that shares the array's memory and keeps it alive. Strides must not be negative."""
    if array.dtype.itemsize == 2 and array.dtype.name == "bfloat16":  # the name of a dtype takes long to look up
        return as_tensor(array.view("int16")).view(torch.bfloat16)
    if type(array).__module__.startswith("numpy"):
        return torch.from_numpy(array)
    return torch.utils.dlpack.from_dlpack(array.__dlpack__(stream=-1))
