"""Conversion between tensors and arrays without a copy: NumPy on the CPU, CuPy on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor


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
