"""Modulated deformable convolution, 3x3, padding 1, with bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import OURS, PEER, Arrays, Case, Contender, Operation
from benchmarks.deform_conv2d_float64 import evaluate
from benchmarks.libraries import rounded, to_nhwc, to_ours, to_torch, torch_backward, torch_forward

if TYPE_CHECKING:
    import torch

PLAIN = "conv2d"
"""The ordinary convolution that the deformable one is an extension of."""

_ARGUMENTS = ("input", "offset", "weight", "bias", "mask")
_PLAIN_ARGUMENTS = ("input", "weight", "bias")
_PER_IMAGE = frozenset({"input", "offset", "mask", "grad_out", "output"})
_K = 9

# Errors of float32 stay below 1e-5 here, those of a wrong implementation are of order 1. Some roundings of the type
# for 16 bits. Float32 convolutions may be Winograd's; torchvision adds up float16 in float16.
_TOLERANCE = {"float32": 2e-5, "float16": 6e-3, "bfloat16": 2e-2}
_PLAIN_TOLERANCE = {**_TOLERANCE, "float32": 2e-4}
_PEER_TOLERANCE = {"float32": 2e-5, "float16": 2e-2}
_TF32_TOLERANCE = 5e-3


def _inputs(case: Case) -> Arrays:
    arrays = dict(_random(case.shape, 1 if case.N == 1 else 2 if case.N == 2 else 16))
    arrays["offset"] = np.float32(case.spread) * arrays["offset"]
    return {
        name: rounded(array[: case.N] if name in _PER_IMAGE else array, case.dtype) for name, array in arrays.items()
    }


@lru_cache(maxsize=12)
def _random(shape: tuple[int, int, int], N: int) -> Arrays:
    C, H, W = shape

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
    C, H, W = case.shape
    return C * _K * H * W * {"float32": 4, "float16": 2, "bfloat16": 2}[case.dtype]


def _work(case: Case) -> tuple[float, float]:
    C, H, W = case.shape
    pixels, size = case.N * H * W, {"float32": 4, "float16": 2, "bfloat16": 2}[case.dtype]
    return 2.0 * pixels * C * C * _K, float(size * (pixels * (2 * C + 3 * _K) + C * C * _K + C))


def _contenders(case: Case) -> list[Contender]:
    tolerance = _TF32_TOLERANCE if case.products == "tf32" else _TOLERANCE[case.dtype]
    found = [Contender(OURS, _ours_forward, _ours_backward, tolerance)]
    # Torchvision has no bfloat16.
    if case.dtype in _PEER_TOLERANCE:
        half = case.dtype == "float16"
        found.append(
            Contender(
                PEER,
                _peer_forward,
                _peer_backward,
                _TF32_TOLERANCE if case.products == "tf32" else _PEER_TOLERANCE[case.dtype],
                # Coordinates rounded to float16 are often exactly -1, where its offset gradient is known to differ.
                unchecked=frozenset({"offset"}) if half else frozenset(),
                coordinates="float16" if half else "float32",
            )
        )
    tolerance = _TF32_TOLERANCE if case.products == "tf32" else _PLAIN_TOLERANCE[case.dtype]
    found.append(Contender(PLAIN, _plain_forward, _plain_backward, tolerance, sees=_without_offsets))
    return found


def _without_offsets(arrays: Arrays) -> Arrays:
    """The arrays for which a plain convolution computes the same."""
    return {**arrays, "offset": np.zeros_like(arrays["offset"]), "mask": np.ones_like(arrays["mask"])}


def _ours_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import dcnops

    arguments = {name: _our_array(case, name, arrays) for name in _ARGUMENTS}
    return lambda: _nchw(case, "output", dcnops.deform_conv2d(**arguments, padding=1, **_our_options(case)))


def _ours_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    import dcnops

    arguments = {name: _our_array(case, name, arrays) for name in (*_ARGUMENTS, "grad_out")}
    options = {**_our_options(case), "padding": 1, "deterministic": case.deterministic}

    def backward() -> dict[str, Any]:
        gradients = dcnops.deform_conv2d_backward(**arguments, **options)._asdict()
        return {name: _nchw(case, name, gradient) for name, gradient in gradients.items()}

    return backward


def _our_options(case: Case) -> dict[str, Any]:
    return {"layout": case.layout, "precision": case.products}


def _our_array(case: Case, name: str, arrays: Arrays) -> Any:
    turned = case.layout == "NHWC" and name in _PER_IMAGE
    return to_ours(case, to_nhwc(arrays[name]) if turned else arrays[name])


def _nchw(case: Case, name: str, array: Any) -> Any:
    """A view."""
    return array.transpose(0, 3, 1, 2) if case.layout == "NHWC" and name in _PER_IMAGE else array


def _peer_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_forward(_peer_call, {name: to_torch(case, arrays[name]) for name in _ARGUMENTS})


def _peer_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    tensors = {name: to_torch(case, arrays[name]) for name in _ARGUMENTS}
    return torch_backward(_peer_call, tensors, to_torch(case, arrays["grad_out"]))


def _peer_call(**tensors: Any) -> Any:
    from torchvision.ops import deform_conv2d

    return deform_conv2d(**tensors, padding=1)


def _plain_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_forward(_plain_call, {name: _plain_tensor(case, arrays[name]) for name in _PLAIN_ARGUMENTS})


def _plain_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    tensors = {name: _plain_tensor(case, arrays[name]) for name in _PLAIN_ARGUMENTS}
    return torch_backward(_plain_call, tensors, _plain_tensor(case, arrays["grad_out"]))


def _plain_tensor(case: Case, array: np.ndarray) -> torch.Tensor:
    import torch

    tensor = to_torch(case, array)
    on_gpu = case.device != "cpu" and tensor.ndim == 4
    return tensor.contiguous(memory_format=torch.channels_last) if on_gpu else tensor


def _plain_call(**tensors: Any) -> Any:
    from torch.nn.functional import conv2d

    return conv2d(**tensors, padding=1)


def _gpu_variants() -> list[dict[str, Any]]:
    """A grid of batches and kinds of data, then one thing at a time; what a reader looks for first comes first."""
    kinds: dict[str, dict[str, Any]] = {
        "float16": {"dtype": "float16"},
        "tf32": {"products": "tf32"},
        "ieee": {},
        "bfloat16": {"dtype": "bfloat16"},
        "3xtf32": {"products": "3xtf32"},
    }
    typical = {"spread": 2.0}
    half, whole = {**typical, "dtype": "float16"}, {**typical, "products": "ieee"}
    return [
        *({**typical, **kinds[kind], "N": N} for N in (16, 1) for kind in ("float16", "tf32", "ieee", "bfloat16")),
        {**half, "N": 16, "deterministic": True},
        {**half, "N": 16, "layout": "NHWC"},
        *({**typical, **kinds[kind], "N": N} for N in (8, 2) for kind in ("float16", "tf32", "ieee", "bfloat16")),
        *({**half, "N": 16, "spread": spread} for spread in (0.5, 8.0)),
        {**whole, "N": 16, "deterministic": True},
        {**whole, "N": 16, "layout": "NHWC"},
        {**half, "N": 1, "layout": "NHWC"},
        *({**typical, **kinds["3xtf32"], "N": N} for N in (16, 1)),
    ]


OPERATION = Operation(
    name="deform_conv2d",
    sizes="C=O x H x W",
    shapes=((64, 56, 56), (128, 100, 168), (256, 50, 84), (512, 50, 84)),
    variants={"cpu": [{}], **dict.fromkeys(("cuda", "rehearsal"), _gpu_variants())},
    per_image=_PER_IMAGE,
    inputs=_inputs,
    contenders=_contenders,
    evaluate=evaluate,
    columns=(OURS, PEER, PLAIN),
    ratios=((PEER, OURS), (OURS, PLAIN)),
    with_memory=(OURS, PEER),
    column_bytes=_column_bytes,
    work=_work,
)
