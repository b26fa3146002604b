"""Arrays of a case in the libraries of the contenders: on the device of the case, in its dtype, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import Case

if TYPE_CHECKING:
    import torch


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest values that `dtype` can hold, in float32."""
    if dtype == "float32":
        return array
    import torch

    return torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()


def to_torch(case: Case, array: np.ndarray, dtype: str | None = None) -> torch.Tensor:
    """A tensor, of another dtype than the case's if need be."""
    import torch

    device = "cuda" if case.device == "cuda" else "cpu"
    return torch.from_numpy(array).to(device, getattr(torch, dtype or case.dtype))


def to_ours(case: Case, array: np.ndarray, dtype: str | None = None) -> Any:
    """A NumPy array on the CPU, a CuPy array on a GPU, of another dtype than the case's if need be."""
    if case.device == "cpu":
        return array
    from dcnops.adapters.torch.arrays import as_array

    on_device = as_array(to_torch(case, array, dtype))
    if case.device == "cuda":
        return on_device
    from benchmarks.rehearsal import STAND_IN

    return STAND_IN.asarray(on_device)


def to_numpy(result: Any) -> np.ndarray:
    """A result of any of the libraries, float32 or wider."""
    if isinstance(result, np.ndarray):
        return np.asarray(result, np.result_type(result.dtype, np.float32))
    if not hasattr(result, "detach"):
        from dcnops.adapters.torch.arrays import as_tensor

        result = as_tensor(result)
    return np.asarray(result.detach().float().cpu())


def to_nhwc(images: np.ndarray) -> np.ndarray:
    """Images with channels last, in memory too."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def torch_forward(call: Callable[..., Any], tensors: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """`call` on tensors that need no gradient."""
    return lambda: call(**tensors)


def torch_backward(
    call: Callable[..., Any], tensors: dict[str, torch.Tensor], grad_out: torch.Tensor
) -> Callable[[], dict[str, Any]]:
    """The gradients of `call` alone: the forward pass happens here, once."""
    import torch

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = call(**leaves)

    def backward() -> dict[str, Any]:
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_out, retain_graph=True)
        return dict(zip(leaves, gradients, strict=True))

    return backward
