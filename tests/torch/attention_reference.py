"""Multi-scale deformable attention as users compute it without an extension: with `grid_sample`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

SHAPES = [(6, 4), (3, 2)]


def attention_by_grid_sample(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> Tensor:
    """Return the output for locations [N, Lq, M, K, 2] and weights [N, Lq, M, K]."""
    N, _, M, D = value.shape
    output: Any = 0
    levels = zip(
        value.split([h * w for h, w in shapes], 1), locations.split(list(points), 3), weights.split(list(points), 3)
    )
    for (h, w), (pixels, positions, factors) in zip(shapes, levels):
        image = pixels.permute(0, 2, 3, 1).reshape(N * M, D, h, w)
        grid = (2 * positions - 1).transpose(1, 2).flatten(0, 1)
        samples = grid_sample(image, grid, align_corners=False).unflatten(0, (N, M))
        output = output + (samples * factors.transpose(1, 2)[:, :, None]).sum(-1)
    return output.permute(0, 3, 1, 2).flatten(2)


def attention_tensors(
    D: int = 3, M: int = 2, Lq: int = 5, points: Sequence[int] = (3, 2), dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, flat locations (inside, across the border and far outside) and weights, with gradients."""
    value = torch.randn(2, sum(h * w for h, w in SHAPES), M, D, dtype=dtype)
    locations = torch.rand(2, Lq, M, sum(points), 2, dtype=dtype) * 1.6 - 0.3
    weights = torch.randn(2, Lq, M, sum(points), dtype=dtype)
    return value.requires_grad_(), locations.requires_grad_(), weights.requires_grad_()
