"""Modulated deformable convolution, 3x3, padding 1, with bias."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from benchmarks.contenders import conv_contenders, rounded
from benchmarks.operations import OURS, PEER, PLAIN, Arrays, Case, Operation
from dcnops._dtypes import DTYPES

_PER_IMAGE = frozenset({"input", "offset", "mask", "grad_out", "output"})
TAPS = 9
"""Sampling points of an output pixel."""


def _inputs(case: Case) -> Arrays:
    images = 1 if case.N == 1 else 2 if case.N == 2 else 16
    arrays = dict(_random(case.shape, images, case.groups, case.deformable_groups))
    arrays["offset"] = np.float32(case.spread) * arrays["offset"]
    return {
        name: rounded(array[: case.N] if name in _PER_IMAGE else array, case.dtype) for name, array in arrays.items()
    }


@lru_cache(maxsize=12)
def _random(shape: tuple[int, int, int], N: int, G: int, D: int) -> Arrays:
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
        "offset": normal(2, N, 2 * D * TAPS, H, W),
        "weight": random.standard_normal((C, C // G, 3, 3), np.float32) * np.float32((TAPS * C // G) ** -0.5),
        "bias": random.standard_normal(C, np.float32),
        "mask": 1 / (1 + np.exp(-normal(3, N, D * TAPS, H, W))),
        "grad_out": normal(4, N, C, H, W),
    }


def expected(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Return the output and gradients of one image in float64, as a sum of deformable 1x1 convolutions.

    One tap at a time bounds the memory. Coordinates are rounded as the contender rounds them, because a bilinear
    gradient jumps at whole pixels.
    """
    import torch

    from dcnops.adapters.torch.differentiable import deform_conv2d

    exact = {name: torch.from_numpy(array).to(device).double() for name, array in arrays.items()}
    rounding, grad_out = getattr(torch, coordinates), exact.pop("grad_out")
    axes = (torch.arange(size, device=device, dtype=torch.float64) for size in grad_out.shape[2:])
    pixels = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    bias = exact.pop("bias")
    groups = torch.arange(exact["mask"].shape[1] // TAPS) * TAPS  # first tap of each deformable group
    results = {name: torch.zeros_like(array) for name, array in exact.items()}
    results |= {"bias": grad_out.sum((0, 2, 3)), "output": bias[:, None, None].expand(grad_out.shape).clone()}
    for k in range(TAPS):
        i, j = divmod(k, 3)
        parts: dict[str, Any] = {
            "input": np.s_[:],
            "offset": np.s_[:, (2 * (groups + k)[:, None] + torch.arange(2)).flatten()],
            "weight": np.s_[:, :, i : i + 1, j : j + 1],
            "mask": np.s_[:, groups + k],
        }
        tap = {name: exact[name][part] for name, part in parts.items()}
        regular = (pixels + torch.tensor([i - 1, j - 1], device=device)[:, None, None]).repeat(len(groups), 1, 1)
        tap["offset"] = (regular.to(rounding) + tap["offset"].to(rounding)).double() - pixels.repeat(len(groups), 1, 1)
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tap.items()}
        output = deform_conv2d(**leaves, bias=None, stride=1, padding=0, dilation=1)
        results["output"] += output.detach()
        gradients = torch.autograd.grad(output, [leaves[name] for name in parts], grad_out)
        for (name, part), gradient in zip(parts.items(), gradients, strict=True):
            results[name][part] += gradient
    return {name: tensor.cpu().numpy() for name, tensor in results.items()}


def _column_bytes(case: Case) -> int:
    C, H, W = case.shape
    return C * TAPS * H * W * DTYPES[case.dtype].itemsize


def _work(case: Case) -> tuple[float, float]:
    C, H, W = case.shape
    pixels, size = case.N * H * W, DTYPES[case.dtype].itemsize
    weights = C * C // case.groups * TAPS
    return 2.0 * pixels * weights, float(size * (pixels * (2 * C + 3 * TAPS * case.deformable_groups) + weights + C))


def _gpu_variants() -> list[dict[str, Any]]:
    """Return a grid of batches and kinds of data, then single changes; the most interesting rows come first."""
    kinds: dict[str, dict[str, Any]] = {
        "float16": {"dtype": "float16"},
        "tf32": {"products": "tf32"},
        "ieee": {},
        "bfloat16": {"dtype": "bfloat16"},
    }
    typical = {"spread": 2.0}
    half, single = {**typical, "dtype": "float16"}, {**typical, "products": "ieee"}
    return [
        *({**typical, **kind, "N": N} for N in (16, 1) for kind in kinds.values()),
        {**half, "N": 16, "deterministic": True},
        {**half, "N": 16, "layout": "NHWC"},
        *({**typical, **kind, "N": N} for N in (8, 2) for kind in kinds.values()),
        *({**half, "N": 16, "spread": spread} for spread in (0.5, 8.0)),
        {**single, "N": 16, "deterministic": True},
        {**single, "N": 16, "layout": "NHWC"},
        {**half, "N": 1, "layout": "NHWC"},
        *({**typical, "products": "3xtf32", "N": N} for N in (16, 1)),
    ]


OTHER_SHAPES = (
    Case("cpu", (64, 128, 128), deformable_groups=8),  # EDVR
    Case("cpu", (128, 64, 64), deformable_groups=16),  # BasicVSR++, ProPainter
    Case("cpu", (128, 48, 48), deformable_groups=128),
    Case("cpu", (256, 14, 14)),
    Case("cpu", (256, 50, 84), groups=32),  # ResNeXt
)
"""Shapes outside the usual ResNet."""

OPERATION = Operation(
    name="deform_conv2d",
    sizes="C=O x H x W",
    shapes=((64, 56, 56), (128, 100, 168), (256, 50, 84), (512, 50, 84)),
    gpu_variants=_gpu_variants(),
    per_image=_PER_IMAGE,
    inputs=_inputs,
    contenders=conv_contenders,
    expected=expected,
    columns=(OURS, PEER, PLAIN),
    other_cases=[
        *OTHER_SHAPES,
        Case("cpu", (512, 25, 42), N=8),
        *(replace(case, device="cuda", dtype="float16", spread=2.0, N=N) for N in (1, 8) for case in OTHER_SHAPES),
    ],
    column_bytes=_column_bytes,
    work=_work,
)
