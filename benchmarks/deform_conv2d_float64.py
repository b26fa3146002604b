"""Deformable convolution in float64, tap by tap with plain gathers: what every contender is held against.

It shares no code and no method with a contender. Coordinates are rounded as the contender rounds them, because a
bilinear gradient jumps at whole pixels; everything else is float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.contenders import Arrays

if TYPE_CHECKING:
    import torch


def evaluate(arrays: Arrays, coordinates: str = "float32", device: str = "cpu") -> Arrays:
    """Output and gradients of a 3x3 convolution with padding 1, one image.

    Parameters
    ----------
    arrays : mapping
        input [1, C, H, W], offset [1, 18, H, W], weight [O, C, 3, 3], bias [O], mask [1, 9, H, W] and
        grad_out [1, O, H, W].
    coordinates : str
        Dtype of the sampling coordinates.
    device : str
        Where torch computes.
    """
    import torch

    exact = {name: torch.from_numpy(array).to(device).double() for name, array in arrays.items()}
    _, C, H, W = exact["input"].shape
    rows = exact["input"].reshape(C, H * W).T.contiguous()
    grad_rows = exact["grad_out"].reshape(-1, H * W).T.contiguous()
    shifts = exact["offset"].reshape(9, 2, H * W).to(getattr(torch, coordinates))
    axes = torch.meshgrid(torch.arange(H, device=device), torch.arange(W, device=device), indexing="ij")
    line, column = (axis.reshape(-1) for axis in axes)

    output = exact["bias"].expand(H * W, -1).clone()
    grad_input = torch.zeros_like(rows)
    grad_offset = torch.zeros(9, 2, H * W, dtype=torch.float64, device=device)
    grad_weight = torch.zeros_like(exact["weight"])
    grad_mask = torch.zeros(9, H * W, dtype=torch.float64, device=device)
    for k in range(9):
        i, j = divmod(k, 3)
        modulation = exact["mask"].reshape(9, H * W)[k]
        py = ((line + i - 1).to(shifts.dtype) + shifts[k, 0]).double()
        px = ((column + j - 1).to(shifts.dtype) + shifts[k, 1]).double()
        grad_column = grad_rows @ exact["weight"][:, :, i, j]
        sampled = torch.zeros_like(rows)
        for weight, slope_y, slope_x, pixel, valid in _corners(py, px, H, W):
            values = rows[pixel] * valid[:, None]
            sampled += weight[:, None] * values
            dots = (grad_column * values).sum(1)
            grad_mask[k] += weight * dots
            grad_offset[k, 0] += modulation * slope_y * dots
            grad_offset[k, 1] += modulation * slope_x * dots
            grad_input.index_add_(0, pixel, (modulation * weight * valid)[:, None] * grad_column)
        sampled *= modulation[:, None]
        output += sampled @ exact["weight"][:, :, i, j].T
        grad_weight[:, :, i, j] = grad_rows.T @ sampled
    results = {
        "output": output.T.reshape(exact["grad_out"].shape),
        "input": grad_input.T.reshape(exact["input"].shape),
        "offset": grad_offset.reshape(exact["offset"].shape),
        "weight": grad_weight,
        "bias": exact["grad_out"].sum((0, 2, 3)),
        "mask": grad_mask.reshape(exact["mask"].shape),
    }
    return {name: tensor.cpu().numpy() for name, tensor in results.items()}


def _corners(
    py: torch.Tensor, px: torch.Tensor, H: int, W: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """The four neighbours: bilinear weight, its derivatives by y and x, flat pixel index, whether it takes part."""
    y0, x0 = py.floor(), px.floor()
    ly, lx = py - y0, px - x0
    inside = (py > -1) & (py < H) & (px > -1) & (px < W)
    corners = []
    for y, wy, slope_y in ((y0, 1 - ly, -1.0), (y0 + 1, ly, 1.0)):
        for x, wx, slope_x in ((x0, 1 - lx, -1.0), (x0 + 1, lx, 1.0)):
            valid = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            pixel = (y * W + x).where(valid, y.new_zeros(())).long()
            corners.append((wy * wx, slope_y * wx, slope_x * wy, pixel, valid.double()))
    return corners
