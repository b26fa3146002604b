"""Implementation in plain torch operations, differentiable any number of times.

Double backward uses it. It is much slower than the kernels and needs memory of the size of the im2col matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
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


def ms_deform_attn(
    g: MSDeformAttnGeometry,
    value: Tensor,
    spatial_shapes: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute `dcnops.ms_deform_attn` in at least float32, without waiting for `spatial_shapes` on a device."""
    compute_dtype = _compute_dtype(value)
    shapes = torch.tensor(g.shapes) if spatial_shapes is None else spatial_shapes
    levels = shapes.to(value.device, torch.int64)
    level_of_point = [level for level, points in enumerate(g.points) for _ in range(points)]
    heights, widths = levels[level_of_point].unbind(1)
    sizes = levels.prod(1)
    starts = (sizes.cumsum(0) - sizes)[level_of_point]

    locations = sampling_locations.to(compute_dtype).reshape(g.N, g.Lq, g.M, g.K, 2).transpose(1, 2)
    x, y = locations[..., 0] * widths - 0.5, locations[..., 1] * heights - 0.5
    inside = (y > -1) & (y < heights) & (x > -1) & (x < widths)
    image = value.to(compute_dtype).permute(0, 2, 3, 1).reshape(g.N * g.M, g.D, g.S)
    y, x, inside = (position.reshape(g.N * g.M, g.Lq * g.K) for position in (y, x, inside))
    heights, widths, starts = (numbers.repeat(g.Lq) for numbers in (heights, widths, starts))
    samples = _interpolate(image, y, x, inside, heights, widths, starts)
    weights = attention_weights.to(compute_dtype).reshape(g.N, g.Lq, g.M, g.K).transpose(1, 2)
    return _weighted_sum(samples, weights).to(value.dtype).reshape(g.output_shape)


def deform_aggregate(g: DeformAggregateGeometry, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
    """Compute `dcnops.deform_aggregate` in at least float32."""
    compute_dtype = _compute_dtype(input)
    if mask is None:
        values = offset[..., : g.G * 3 * g.K].reshape(g.N, g.oh, g.ow, g.G, 3 * g.K)
        offset, mask = values.split([2 * g.K, g.K], dim=-1)
    shift = g.offset_scale * offset.to(compute_dtype).reshape(g.N, g.oh, g.ow, g.G, g.K, 2).permute(0, 3, 1, 2, 4, 5)
    rows, columns = (torch.tensor(taps, device=input.device, dtype=compute_dtype) for taps in zip(*g.taps))
    tops = _tap_positions(rows, g.oh, g.kh, g.sh, g.ph, g.dh, g.offset_scale)
    lefts = _tap_positions(columns, g.ow, g.kw, g.sw, g.pw, g.dw, g.offset_scale)
    y = tops[:, None] + shift[..., 1]
    x = lefts + shift[..., 0]
    inside = (y > -1) & (y < g.H) & (x > -1) & (x < g.W)
    image = input.to(compute_dtype).reshape(g.N, g.H * g.W, g.G, g.D).permute(0, 2, 3, 1)
    y, x, inside = (position.reshape(g.N * g.G, g.oh * g.ow * g.K) for position in (y, x, inside))
    samples = _interpolate(image.reshape(g.N * g.G, g.D, g.H * g.W), y, x, inside, g.H, g.W)
    weights = mask.to(compute_dtype).reshape(g.N, g.oh * g.ow, g.G, g.K).transpose(1, 2)
    return _weighted_sum(samples, weights).to(input.dtype).reshape(g.output_shape)


def _tap_positions(
    taps: Tensor, extent: int, kernel_size: int, stride: int, padding: int, dilation: int, offset_scale: float
) -> Tensor:
    """Return the positions of taps without offsets along one axis, [pixels of the output, taps]."""
    center = dilation * (kernel_size - 1) // 2
    start = torch.arange(extent, device=taps.device)[:, None] * stride - padding + center
    return start + offset_scale * (taps * dilation - center)


def _weighted_sum(samples: Tensor, weights: Tensor) -> Tensor:
    """Return [N, queries, heads, channels]: `samples` [N*heads, channels, queries*K] weighted and summed over K.

    `weights` are [N, heads, queries, K].
    """
    N, M, queries, K = weights.shape
    samples = samples.reshape(N, M, samples.shape[1], queries, K)
    return torch.einsum("nmdqk,nmqk->nqmd", samples, weights)


def _displacement(factor: Tensor, offset: Tensor) -> Tensor:
    """Return `factor * offset`, but an infinite offset for an infinite offset, even if the factor is 0."""
    return torch.where(torch.isinf(offset), offset.detach(), factor * offset)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _adaptive_samples(length: Tensor) -> int:
    """Return the number of samples: one per pixel of a bin, or one NaN sample if the region is not finite."""
    return max(int(length.ceil()), 0) if bool(torch.isfinite(length)) else 1


def _interpolate(
    image: Tensor, y: Tensor, x: Tensor, inside: Tensor, H: int | Tensor, W: int | Tensor, start: int | Tensor = 0
) -> Tensor:
    """Sample images [B, C, H*W] bilinearly at positions [B, points], giving [B, C, points]; 0 where not `inside`.

    Several images may follow one another in `image`. Then `H`, `W` and `start` are tensors [points]: the size of the
    image of each point, and the index of its first pixel. Pixels beyond the end of `image` do not count.
    """
    # Zero, or NaN at a NaN position: its sample must become NaN.
    taint = (0 * torch.where(torch.isnan(y) | torch.isnan(x), y + x, 0.0))[:, None]
    y, x = torch.where(inside, y, y.new_zeros(())), torch.where(inside, x, x.new_zeros(()))
    y0, x0 = y.detach().floor(), x.detach().floor()
    ly, lx = y - y0, x - x0
    total = image.new_zeros(())
    for row, weight_y in ((y0, 1 - ly), (y0 + 1, ly)):
        for column, weight_x in ((x0, 1 - lx), (x0 + 1, lx)):
            index = row.long() * W + column.long() + start
            is_pixel = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
            is_pixel &= (index >= 0) & (index < image.shape[2])
            index = torch.where(is_pixel, index, 0)
            pixels = image.gather(2, index[:, None].expand(-1, image.shape[1], -1))
            total = total + torch.where(is_pixel, weight_y * weight_x, 0.0)[:, None] * pixels
    return total + taint
