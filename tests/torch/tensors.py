"""Test cases as PyTorch tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from dcnops.adapters.torch import deform_aggregate, deform_conv2d, deform_roi_pool, ms_deform_attn
from tests.cases import Case

OPERATIONS = {
    "deform_conv2d": deform_conv2d,
    "deform_roi_pool": deform_roi_pool,
    "ms_deform_attn": ms_deform_attn,
    "deform_aggregate": deform_aggregate,
}


def to_tensor(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def as_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: to_tensor(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}


def tensors_of(case: Case, requires_grad: bool = False) -> dict[str, Any]:
    arguments = as_tensors(case.arguments())
    for name in case.needs:
        arguments[name].requires_grad_(requires_grad)
    return arguments


def call(case: Case, arguments: dict[str, Any]) -> torch.Tensor:
    return OPERATIONS[case.operation](**arguments)
