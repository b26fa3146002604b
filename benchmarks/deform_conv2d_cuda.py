"""The contenders of deform_conv2d on a GPU: dcnops on CuPy arrays, the peers on torch tensors, all on one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import torch

import dcnops
from benchmarks.contenders import OURS, PEER, PLAIN, Arrays, Case, Contender
from benchmarks.deform_conv2d import (
    ARGUMENTS,
    PLAIN_ARGUMENTS,
    TOLERANCE,
    peer_call,
    plain_call,
    torch_backward,
    torch_forward,
    without_offsets,
)

__all__ = ["contenders"]

# Some roundings of the type for 16 bits. cuDNN's float32 convolutions may be Winograd's; torchvision adds up float16 in
# float16.
_OURS = {"float32": TOLERANCE, "float16": 6e-3, "bfloat16": 2e-2}
_PLAIN = {"float32": 2e-4, "float16": 6e-3, "bfloat16": 2e-2}
_PEER = {"float32": TOLERANCE, "float16": 2e-2}
_TF32 = 5e-3


def contenders(case: Case) -> list[Contender]:
    """Torchvision has no bfloat16."""
    found = [Contender(OURS, _ours_forward, _ours_backward, _cupy_to_numpy, _OURS[case.dtype])]
    if case.dtype in _PEER:
        half = case.dtype == "float16"
        found.append(
            Contender(
                PEER,
                _peer_forward,
                _peer_backward,
                _torch_to_numpy,
                _TF32 if case.tf32 else _PEER[case.dtype],
                # Coordinates rounded to float16 are often exactly -1, where its offset gradient is known to differ.
                unchecked=frozenset({"offset"}) if half else frozenset(),
                coordinates="float16" if half else "float32",
            )
        )
    plain_tolerance = _TF32 if case.tf32 else _PLAIN[case.dtype]
    found.append(
        Contender(PLAIN, _plain_forward, _plain_backward, _torch_to_numpy, plain_tolerance, sees=without_offsets)
    )
    return found


def _tensor(case: Case, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to("cuda", getattr(torch, case.dtype))


def _tensors(case: Case, arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: _tensor(case, arrays[name]) for name in ARGUMENTS}


def _plain_tensor(case: Case, array: np.ndarray) -> torch.Tensor:
    tensor = _tensor(case, array)
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _plain_tensors(case: Case, arrays: Arrays) -> dict[str, torch.Tensor]:
    return {name: _plain_tensor(case, arrays[name]) for name in PLAIN_ARGUMENTS}


def _cupy_arrays(case: Case, arrays: Arrays) -> dict[str, cupy.ndarray]:
    return {name: cupy.from_dlpack(tensor) for name, tensor in _tensors(case, arrays).items()}


def _ours_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    on_device = _cupy_arrays(case, arrays)
    return lambda: dcnops.deform_conv2d(**on_device, padding=1)


def _ours_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    on_device = _cupy_arrays(case, arrays)
    grad_out = cupy.from_dlpack(_tensor(case, arrays["grad_out"]))
    return lambda: dcnops.deform_conv2d_backward(grad_out, **on_device, padding=1)._asdict()


def _peer_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_forward(peer_call, _tensors(case, arrays))


def _peer_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_backward(peer_call, _tensors(case, arrays), _tensor(case, arrays["grad_out"]))


def _plain_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_forward(plain_call, _plain_tensors(case, arrays))


def _plain_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_backward(plain_call, _plain_tensors(case, arrays), _plain_tensor(case, arrays["grad_out"]))


def _cupy_to_numpy(array: cupy.ndarray) -> np.ndarray:
    result: np.ndarray = cupy.asnumpy(array.astype(np.float32))
    return result


def _torch_to_numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
