"""Reference implementation of deformable convolution and RoI pooling in plain loops and float64.

Only coordinates are computed in the precision of the library, float32 unless the data are float64, so that rounded
coordinates fall on the same side of a kink or of the image border.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import floor, isnan

import numpy as np


@dataclass
class Sample:
    """Sampling point of tap `k` in deformable group `d` for output pixel (a, b) of image `n`."""

    n: int
    d: int
    k: int
    a: int
    b: int
    y: float
    x: float
    modulation: float
    channels: slice
    """Channels of the deformable group."""

    def corners(self, H: int, W: int) -> Iterator[tuple[int, int, float, float, float]]:
        """Yield (row, column, weight, d weight / dy, d weight / dx) of the neighbours inside the image."""
        return bilinear_corners(self.y, self.x, H, W)


def bilinear_corners(y: float, x: float, H: int, W: int) -> Iterator[tuple[int, int, float, float, float]]:
    """Yield (row, column, weight, d weight / dy, d weight / dx) of the neighbours of (y, x) inside an image."""
    if not (-1 < y < H and -1 < x < W):
        return
    y0, x0 = floor(y), floor(x)
    ly, lx = y - y0, x - x0
    for r, wy, dwy in ((y0, 1 - ly, -1.0), (y0 + 1, ly, 1.0)):
        for s, wx, dwx in ((x0, 1 - lx, -1.0), (x0 + 1, lx, 1.0)):
            if 0 <= r < H and 0 <= s < W:
                yield r, s, wy * wx, dwy * wx, wy * dwx


def times(factor: float, value: np.ndarray) -> np.ndarray:
    """Return a product that is 0 if the factor is 0, even for infinity and NaN."""
    return factor * value if factor != 0 else np.zeros_like(value)


def expand_padding(padding: object) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right)."""
    if isinstance(padding, int):
        return (padding,) * 4
    vertical, horizontal = padding
    if isinstance(vertical, int):
        return vertical, vertical, horizontal, horizontal
    return (*vertical, *horizontal)


def expand_pair(value: object) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


class DeformConv2d:
    """One call of deformable convolution."""

    def __init__(self, input, offset, weight, bias=None, stride=1, padding=0, dilation=1, mask=None):
        self.coordinate = np.float64 if input.dtype == np.float64 else np.float32
        self.x = np.asarray(input).astype(np.float64)
        self.offset = np.asarray(offset).astype(self.coordinate)
        self.mask = None if mask is None else np.asarray(mask).astype(np.float64)
        self.weight = np.asarray(weight).astype(np.float64)
        self.bias = None if bias is None else np.asarray(bias).astype(np.float64)
        self.N, self.C, self.H, self.W = self.x.shape
        self.O, group_channels, self.kh, self.kw = self.weight.shape
        self.K = self.kh * self.kw
        self.G = self.C // group_channels
        self.D = self.offset.shape[1] // (2 * self.K)
        (self.sh, self.sw), (self.dh, self.dw) = expand_pair(stride), expand_pair(dilation)
        self.top, bottom, self.left, right = expand_padding(padding)
        self.oh = (self.H + self.top + bottom - self.dh * (self.kh - 1) - 1) // self.sh + 1
        self.ow = (self.W + self.left + right - self.dw * (self.kw - 1) - 1) // self.sw + 1

    def samples(self) -> Iterator[Sample]:
        channels = self.C // self.D
        for n, d, k, a, b in np.ndindex(self.N, self.D, self.K, self.oh, self.ow):
            i, j = divmod(k, self.kw)
            channel = d * self.K + k
            with np.errstate(invalid="ignore", over="ignore"):
                y = self.coordinate(a * self.sh - self.top + i * self.dh) + self.offset[n, 2 * channel, a, b]
                x = self.coordinate(b * self.sw - self.left + j * self.dw) + self.offset[n, 2 * channel + 1, a, b]
            modulation = 1.0 if self.mask is None else float(self.mask[n, channel, a, b])
            yield Sample(n, d, k, a, b, float(y), float(x), modulation, slice(d * channels, (d + 1) * channels))

    def columns(self) -> np.ndarray:
        """Return the modulated samples [N, C, K, oh, ow]."""
        columns = np.zeros((self.N, self.C, self.K, self.oh, self.ow))
        for p in self.samples():
            column = np.zeros(self.C // self.D)
            for r, s, weight, _, _ in p.corners(self.H, self.W):
                factor = 0.0 if weight == 0 else weight * p.modulation
                column = column + times(factor, self.x[p.n, p.channels, r, s])
            columns[p.n, p.channels, p.k, p.a, p.b] = np.nan if isnan(p.y) or isnan(p.x) else column
        return columns

    def forward(self) -> np.ndarray:
        columns = self.columns().reshape(self.N, self.G, self.C // self.G, self.K, self.oh, self.ow)
        weight = self.weight.reshape(self.G, self.O // self.G, self.C // self.G, self.K)
        output = np.einsum("ngckab,gock->ngoab", columns, weight).reshape(self.N, self.O, self.oh, self.ow)
        return output if self.bias is None else output + self.bias[:, None, None]

    def backward(self, grad_out: np.ndarray) -> dict[str, np.ndarray]:
        grad_out = np.asarray(grad_out).astype(np.float64)
        by_group = grad_out.reshape(self.N, self.G, self.O // self.G, self.oh, self.ow)
        columns = self.columns().reshape(self.N, self.G, self.C // self.G, self.K, self.oh, self.ow)
        weight = self.weight.reshape(self.G, self.O // self.G, self.C // self.G, self.K)
        grad_columns = np.einsum("ngoab,gock->ngckab", by_group, weight)
        grad_columns = grad_columns.reshape(self.N, self.C, self.K, self.oh, self.ow)

        grad_input = np.zeros_like(self.x)
        grad_offset = np.zeros(self.offset.shape)
        grad_mask = np.zeros((self.N, self.D * self.K, self.oh, self.ow))
        for p in self.samples():
            t = grad_columns[p.n, p.channels, p.k, p.a, p.b]
            d_y = d_x = d_modulation = 0.0
            for r, s, weight_, weight_y, weight_x in p.corners(self.H, self.W):
                pixel = self.x[p.n, p.channels, r, s]
                factor = 0.0 if weight_ == 0 else weight_ * p.modulation
                grad_input[p.n, p.channels, r, s] += times(factor, t)
                d_modulation = d_modulation + times(weight_, pixel * t).sum()
                d_y = d_y + times(p.modulation * weight_y, pixel * t).sum()
                d_x = d_x + times(p.modulation * weight_x, pixel * t).sum()
            if isnan(p.y) or isnan(p.x):
                d_y = d_x = d_modulation = np.nan
            channel = p.d * self.K + p.k
            grad_offset[p.n, 2 * channel : 2 * channel + 2, p.a, p.b] = d_y, d_x
            grad_mask[p.n, channel, p.a, p.b] = d_modulation
        gradients = {
            "input": grad_input,
            "offset": grad_offset,
            "weight": np.einsum("ngoab,ngckab->gock", by_group, columns).reshape(self.weight.shape),
        }
        if self.bias is not None:
            gradients["bias"] = grad_out.sum((0, 2, 3))
        if self.mask is not None:
            gradients["mask"] = grad_mask
        return gradients


def deform_conv2d(*args, **kwargs) -> np.ndarray:
    """Compute `dcnops.deform_conv2d` in float64."""
    return DeformConv2d(*args, **kwargs).forward()


def deform_conv2d_backward(grad_out, *args, **kwargs) -> dict[str, np.ndarray]:
    """Compute `dcnops.deform_conv2d_backward` in float64, for all given arguments."""
    return DeformConv2d(*args, **kwargs).backward(grad_out)


class DeformRoIPool:
    """One call of deformable RoI pooling."""

    def __init__(self, input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma):
        self.coordinate = np.float64 if input.dtype == np.float64 else np.float32
        self.x = np.asarray(input).astype(np.float64)
        self.rois = np.asarray(rois).astype(self.coordinate)
        self.P, self.Q = expand_pair(output_size)
        self.N, self.C, self.H, self.W = self.x.shape
        R = len(self.rois)
        self.offset = np.zeros((R, 2, self.P, self.Q)) if offset is None else np.asarray(offset)
        self.offset = self.offset.astype(self.coordinate)
        self.mask = np.ones((R, self.P, self.Q)) if mask is None else np.asarray(mask).astype(np.float64)
        self.given = {"input": True, "offset": offset is not None, "mask": mask is not None}
        self.scale, self.gamma = self.coordinate(spatial_scale), self.coordinate(gamma)
        self.sampling_ratio = sampling_ratio

    def positions(self, r: int, bin: int, bins: int, low: int, offset: np.floating):
        """Return the length of a region and the positions of a bin's samples along an axis, None for a NaN bin."""
        of = self.coordinate
        with np.errstate(all="ignore"):
            start = self.scale * self.rois[r, low] - of(0.5)
            region = (self.scale * self.rois[r, low + 2] - of(0.5)) - start
            length = region / of(bins)
            counts = offset != 0 and not np.isinf(offset)  # otherwise the factor does not matter
            first = (start + of(bin) * length) + ((self.gamma * region) * offset if counts else offset)
            if not np.isfinite(region) or np.isnan(first):
                return region, None
            count = self.sampling_ratio or int(min(max(np.ceil(length), 0), 2**24))
            # Vectorised: adaptive sampling of a huge region has millions of samples, almost all of them outside.
            return region, first + (np.arange(count, dtype=self.coordinate) + of(0.5)) * length / of(max(count, 1))

    def axis(self, r: int, bin: int, bins: int, low: int, extent: int, offset: np.floating):
        """Return the length of the region, the samples per bin, their neighbours, and True for a NaN bin.

        A neighbour is (pixel, weight, d weight / d position) of a sample that is clamped to the image.
        """
        region, positions = self.positions(r, bin, bins, low, offset)
        if positions is None:
            return region, 0, [], True
        neighbours = []
        for position in positions[(positions >= -1) & (positions <= extent)]:
            clamped = max(float(position), 0.0)
            at = min(int(clamped), extent - 1)
            free = at + 1 < extent
            slope = 1.0 if free and position >= 0 else 0.0
            fraction = clamped - at if free else 0.0
            neighbours += [(at, 1 - fraction, -slope), (at + free, fraction, slope)]
        return region, len(positions), neighbours, False

    def bins(self):
        """Yield (r, p, q), image, neighbours along y and x, 1 / samples, region size, and True for a NaN bin."""
        for r, p, q in np.ndindex(len(self.rois), self.P, self.Q):
            height, rows, ys, y_is_nan = self.axis(r, p, self.P, 2, self.H, self.offset[r, 1, p, q])
            width, columns, xs, x_is_nan = self.axis(r, q, self.Q, 1, self.W, self.offset[r, 0, p, q])
            is_nan = y_is_nan or x_is_nan or not 0 <= self.rois[r, 0] < self.N
            image = 0 if is_nan else int(self.rois[r, 0])
            yield (r, p, q), image, ys, xs, 1 / max(rows * columns, 1), (float(height), float(width)), is_nan

    def forward(self) -> np.ndarray:
        output = np.zeros((len(self.rois), self.C, self.P, self.Q))
        for (r, p, q), n, ys, xs, share, _, is_nan in self.bins():
            total = np.zeros(self.C)
            for (row, wy, _), (column, wx, _) in product(ys, xs):
                total = total + times(wy * wx, self.x[n, :, row, column])
            output[r, :, p, q] = np.nan if is_nan else times(self.mask[r, p, q] * share, total)
        return output

    def backward(self, grad_out: np.ndarray) -> dict[str, np.ndarray]:
        grad_out = np.asarray(grad_out).astype(np.float64)
        grad_input, grad_offset = np.zeros_like(self.x), np.zeros(self.offset.shape)
        grad_mask = np.zeros(self.mask.shape)
        for (r, p, q), n, ys, xs, share, (height, width), is_nan in self.bins():
            t = grad_out[r, :, p, q]
            value = slope_y = slope_x = 0.0
            for (row, wy, dy), (column, wx, dx) in product(ys, xs):
                pixel = self.x[n, :, row, column]
                if not is_nan:
                    grad_input[n, :, row, column] += times(wy * wx * self.mask[r, p, q] * share, t)
                value = value + times(wy * wx, pixel * t).sum()
                slope_y = slope_y + times(dy * wx, pixel * t).sum()
                slope_x = slope_x + times(wy * dx, pixel * t).sum()
            factor = float(self.gamma) * self.mask[r, p, q] * share
            if is_nan:
                grad_offset[r, :, p, q] = grad_mask[r, p, q] = np.nan
            else:
                with np.errstate(over="ignore"):
                    factors = self.coordinate(factor * width), self.coordinate(factor * height)
                grad_offset[r, 0, p, q] = times(factors[0], slope_x) if slope_x else 0
                grad_offset[r, 1, p, q] = times(factors[1], slope_y) if slope_y else 0
                grad_mask[r, p, q] = share * value
        gradients = {"input": grad_input, "offset": grad_offset, "mask": grad_mask}
        return {name: gradient for name, gradient in gradients.items() if self.given[name]}


def deform_roi_pool(*args, **kwargs) -> np.ndarray:
    """Compute `dcnops.deform_roi_pool` in float64."""
    return DeformRoIPool(*args, **kwargs).forward()


def deform_roi_pool_backward(grad_out, *args, **kwargs) -> dict[str, np.ndarray]:
    """Compute `dcnops.deform_roi_pool_backward` in float64, for all given arguments."""
    return DeformRoIPool(*args, **kwargs).backward(grad_out)
