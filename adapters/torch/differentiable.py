"""Implementation in plain torch operations, differentiable any number of times.

Double backward uses it. It is much slower than the kernels and needs memory of the size of the im2col matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
) -> Tensor:
    """Compute `dcnops.deform_conv2d` in at least float32."""
    g = DeformConvGeometry.of(input, offset, weight, bias, mask, stride, padding, dilation)
    compute_dtype = _compute_dtype(input)
    shift = offset.to(compute_dtype).reshape(g.N, g.D, g.K, 2, g.oh, g.ow)
    taps_y = torch.arange(g.kh, device=input.device).repeat_interleave(g.kw) * g.dh - g.pad_top
    taps_x = torch.arange(g.kw, device=input.device).repeat(g.kh) * g.dw - g.pad_left
    output_y = torch.arange(g.oh, device=input.device) * g.sh
    output_x = torch.arange(g.ow, device=input.device) * g.sw
    y = (taps_y[:, None, None] + output_y[:, None]).to(compute_dtype) + shift[:, :, :, 0]
    x = (taps_x[:, None, None] + output_x).to(compute_dtype) + shift[:, :, :, 1]

    image = input.to(compute_dtype).reshape(g.N * g.D, g.C // g.D, g.H * g.W)
    points = (g.N * g.D, g.K * g.oh * g.ow)
    inside = (y > -1) & (y < g.H) & (x > -1) & (x < g.W)
    samples = _interpolate(image, y.reshape(points), x.reshape(points), inside.reshape(points), g.H, g.W)
    samples = samples.reshape(g.N, g.D, g.C // g.D, g.K, g.oh, g.ow)
    if mask is not None:
        samples = samples * mask.to(compute_dtype).reshape(g.N, g.D, 1, g.K, g.oh, g.ow)
    columns = samples.reshape(g.N, g.G, g.C // g.G, g.K, g.oh, g.ow)
    filters = weight.to(compute_dtype).reshape(g.G, g.O // g.G, g.C // g.G, g.K)
    output = torch.einsum("ngckab,gock->ngoab", columns, filters).reshape(g.output_shape)
    if bias is not None:
        output = output + bias.to(compute_dtype)[:, None, None]
    return output.to(input.dtype)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Any,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor:
    """Compute `dcnops.deform_roi_pool` in at least float32.

    Every sample is evaluated, even outside the image. With `sampling_ratio` 0, time and memory therefore grow with the
    area of the regions.
    """
    g = DeformRoIPoolGeometry.of(input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma)
    compute_dtype = _compute_dtype(input)
    regions = rois.to(compute_dtype)
    shift = input.new_zeros((g.R, 2, g.P, g.Q), dtype=compute_dtype) if offset is None else offset.to(compute_dtype)
    outputs = []
    for r in range(g.R):
        start = g.spatial_scale * regions[r, 1:] - 0.5
        width, height = start[2] - start[0], start[3] - start[1]
        bin_height, bin_width = height / g.P, width / g.Q
        samples_y = g.sampling_ratio or _adaptive_samples(bin_height)
        samples_x = g.sampling_ratio or _adaptive_samples(bin_width)
        p = torch.arange(g.P, device=input.device)[:, None]
        q = torch.arange(g.Q, device=input.device)
        top = start[1] + p * bin_height + _displacement(g.gamma * height, shift[r, 1])
        left = start[0] + q * bin_width + _displacement(g.gamma * width, shift[r, 0])
        i = (torch.arange(samples_y, device=input.device).to(compute_dtype) + 0.5) * bin_height / max(samples_y, 1)
        j = (torch.arange(samples_x, device=input.device).to(compute_dtype) + 0.5) * bin_width / max(samples_x, 1)
        y = (top[:, :, None, None] + i[:, None]).expand(g.P, g.Q, samples_y, samples_x)
        x = (left[:, :, None, None] + j).expand(g.P, g.Q, samples_y, samples_x)
        inside = (y >= -1) & (y <= g.H) & (x >= -1) & (x <= g.W)
        # Clamp like RoIAlign: a clamped sample has no derivative with respect to its position.
        y, x = y.clamp(0, g.H - 1), x.clamp(0, g.W - 1)
        image = input.index_select(0, rois[r, :1].long()).to(compute_dtype).reshape(1, g.C, g.H * g.W)
        samples = _interpolate(image, y.reshape(1, -1), x.reshape(1, -1), inside.reshape(1, -1), g.H, g.W)
        outputs.append(samples.reshape(g.C, g.P, g.Q, samples_y * samples_x).sum(-1) / max(samples_y * samples_x, 1))
    output = torch.stack(outputs) if outputs else input.new_zeros(g.output_shape, dtype=compute_dtype)
    if mask is not None:
        output = output * mask.to(compute_dtype)[:, None]
    return output.to(input.dtype)


def _displacement(factor: Tensor, offset: Tensor) -> Tensor:
    """Return `factor * offset`, but an infinite offset for an infinite offset, even if the factor is 0."""
    return torch.where(torch.isinf(offset), offset.detach(), factor * offset)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _adaptive_samples(length: Tensor) -> int:
    """Return the number of samples: one per pixel of a bin, or one NaN sample if the region is not finite."""
    return max(int(length.ceil()), 0) if bool(torch.isfinite(length)) else 1


def _interpolate(image: Tensor, y: Tensor, x: Tensor, inside: Tensor, H: int, W: int) -> Tensor:
    """Sample images [B, C, H*W] bilinearly at positions [B, points], giving [B, C, points]; 0 where not `inside`."""
    # Zero, or NaN at a NaN position: its sample must become NaN.
    taint = (0 * torch.where(torch.isnan(y + x), y + x, 0.0))[:, None]
    y, x = torch.where(inside, y, y.new_zeros(())), torch.where(inside, x, x.new_zeros(()))
    y0, x0 = y.detach().floor(), x.detach().floor()
    ly, lx = y - y0, x - x0
    total = image.new_zeros(())
    for row, weight_y in ((y0, 1 - ly), (y0 + 1, ly)):
        for column, weight_x in ((x0, 1 - lx), (x0 + 1, lx)):
            is_pixel = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            index = row.clamp(0, H - 1).long() * W + column.clamp(0, W - 1).long()
            pixels = image.gather(2, index[:, None].expand(-1, image.shape[1], -1))
            total = total + torch.where(is_pixel, weight_y * weight_x, 0.0)[:, None] * pixels
    return total + taint
