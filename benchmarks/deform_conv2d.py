"""Modulated deformable convolution, 3x3, padding 1, with bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.contenders import OURS, PEER, PLAIN, Arrays, Case, Contender, Operation
from benchmarks.deform_conv2d_float64 import evaluate

__all__ = [
    "ARGUMENTS",
    "OPERATION",
    "PLAIN_ARGUMENTS",
    "TOLERANCE",
    "peer_call",
    "plain_call",
    "torch_backward",
    "torch_forward",
    "without_offsets",
]

ARGUMENTS = ("input", "offset", "weight", "bias", "mask")
PLAIN_ARGUMENTS = ("input", "weight", "bias")

_PER_IMAGE = frozenset({"input", "offset", "mask", "grad_out", "output"})
_K = 9

# Errors of float32 stay below 1e-6 here, those of a wrong implementation are of order 1.
TOLERANCE = 2e-5


def _inputs(case: Case) -> Arrays:
    arrays = _random(case.C, case.H, case.W, 1 if case.N == 1 else 16)
    arrays = {name: array[: case.N] if name in _PER_IMAGE else array for name, array in arrays.items()}
    if case.dtype == "float32":
        return arrays
    import torch

    dtype = getattr(torch, case.dtype)
    return {name: torch.from_numpy(array).to(dtype).float().numpy() for name, array in arrays.items()}


@lru_cache(maxsize=2)
def _random(C: int, H: int, W: int, N: int) -> Arrays:
    def normal(stream: int, *shape: int) -> np.ndarray:
        # One stream per array and image: a batch begins with the image of a batch of one.
        images = (
            np.random.default_rng([stream, n]).standard_normal((1, *shape[1:]), np.float32) for n in range(shape[0])
        )
        return np.concatenate(list(images))

    random = np.random.default_rng(0)
    return {
        "input": normal(1, N, C, H, W),
        "offset": normal(2, N, 2 * _K, H, W),
        "weight": random.standard_normal((C, C, 3, 3), np.float32) * np.float32((_K * C) ** -0.5),
        "bias": random.standard_normal(C, np.float32),
        "mask": 1 / (1 + np.exp(-normal(3, N, _K, H, W))),
        "grad_out": normal(4, N, C, H, W),
    }


def _column_bytes(case: Case) -> int:
    return case.C * _K * case.H * case.W * {"float32": 4, "float16": 2, "bfloat16": 2}[case.dtype]


def without_offsets(arrays: Arrays) -> Arrays:
    """The arrays for which a plain convolution computes the same."""
    return {**arrays, "offset": np.zeros_like(arrays["offset"]), "mask": np.ones_like(arrays["mask"])}


def _contenders(case: Case) -> list[Contender]:
    if case.device == "cuda":
        from benchmarks import deform_conv2d_cuda

        return deform_conv2d_cuda.contenders(case)
    return [
        Contender(OURS, _ours_forward, _ours_backward, np.asarray, TOLERANCE),
        Contender(PEER, _peer_forward, _peer_backward, _torch_to_numpy, TOLERANCE),
        Contender(PLAIN, _plain_forward, _plain_backward, _torch_to_numpy, TOLERANCE, sees=without_offsets),
    ]


def _ours_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import dcnops

    arguments: dict[str, Any] = {name: arrays[name] for name in ARGUMENTS}
    return lambda: dcnops.deform_conv2d(**arguments, padding=1)


def _ours_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import dcnops

    arguments: dict[str, Any] = {name: arrays[name] for name in ARGUMENTS}
    return lambda: dcnops.deform_conv2d_backward(arrays["grad_out"], **arguments, padding=1)._asdict()


def _peer_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import torch

    return torch_forward(peer_call, {name: torch.from_numpy(arrays[name]) for name in ARGUMENTS})


def _peer_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import torch

    tensors = {name: torch.from_numpy(arrays[name]) for name in ARGUMENTS}
    return torch_backward(peer_call, tensors, torch.from_numpy(arrays["grad_out"]))


def _plain_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import torch

    return torch_forward(plain_call, {name: torch.from_numpy(arrays[name]) for name in PLAIN_ARGUMENTS})


def _plain_backward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import torch

    tensors = {name: torch.from_numpy(arrays[name]) for name in PLAIN_ARGUMENTS}
    return torch_backward(plain_call, tensors, torch.from_numpy(arrays["grad_out"]))


def _torch_to_numpy(tensor: Any) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array


def peer_call(**tensors: Any) -> Any:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(**tensors, padding=1)


def plain_call(**tensors: Any) -> Any:
    from torch.nn.functional import conv2d

    return conv2d(**tensors, padding=1)


def torch_forward(call: Callable[..., Any], tensors: dict[str, Any]) -> Callable[[], Any]:
    """`call` on tensors that need no gradient."""
    return lambda: call(**tensors)


def torch_backward(call: Callable[..., Any], tensors: dict[str, Any], grad_out: Any) -> Callable[[], dict[str, Any]]:
    """The gradients of `call` alone: the forward pass happens here, once."""
    import torch

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = call(**leaves)

    def backward() -> dict[str, Any]:
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_out, retain_graph=True)
        return dict(zip(leaves, gradients, strict=True))

    return backward


OPERATION = Operation(
    name="deform_conv2d",
    module=__name__,
    shapes=((64, 56, 56), (128, 100, 168), (256, 50, 84), (512, 50, 84)),
    per_image=_PER_IMAGE,
    inputs=_inputs,
    contenders=_contenders,
    evaluate=evaluate,
    column_bytes=_column_bytes,
)
