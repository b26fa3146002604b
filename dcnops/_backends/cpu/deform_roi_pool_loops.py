"""Compiled loops of deformable RoI pooling on the CPU.

As in `deform_conv2d_loops`, kernels process the work items ``begin <= item < end``, release the GIL, and write no
element that another item writes. Arrays are C-contiguous and of one dtype.

The samples of a bin form a grid, so the weight of a pixel is the product of a vertical and a horizontal weight. A bin
is therefore a list of pixels, each listed once even if several samples touch it. The list holds the weight of each
pixel and its derivatives with respect to the position of the bin.

Arguments that the kernels share:

sizes : tuple of int
    H, W, P, Q and sampling_ratio.
scale, gamma : float
    In the dtype of the arrays.
image : array [N, H*W + 1, C]
    Channels-last; the last pixel of each image is zero.
images : array of int64 [R]
    Image of each region.
rois : array [R, 5]
    Regions, of which columns 1 to 4 are read.
offset : array [R, 2, P*Q], or empty
mask : array [R, P*Q], or empty
axes : array [4, max(H, W)]
    Scratch memory of the thread, all zero: vertical weights and slopes, horizontal weights and slopes.
pixels : array of int [H*W + 3], weights : array [3, H*W + 3]
    Scratch memory of the thread: the pixel list of a bin, padded to a multiple of four.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dcnops._backends.cpu.compiled import exact, inner, kernel, larger, smaller

MAX_SAMPLES = 2**24
"""Limit of the adaptive number of samples of a bin along an axis."""


@inner()
def _sample_count(length: Any, sampling_ratio: int) -> Any:
    """Return the number of samples of a bin along an axis."""
    if sampling_ratio > 0:
        return sampling_ratio
    pixels = np.ceil(length)
    if pixels > 0:
        return np.intp(pixels) if pixels < MAX_SAMPLES else MAX_SAMPLES
    return 0


@inner()
def _clamped(value: Any, limit: int) -> Any:
    """Return a number as an integer from 0 to `limit`."""
    if value > 0:
        return np.intp(value) if value < limit else limit
    return 0


@inner()
def _sample_range(start: Any, length: Any, samples: int, extent: int) -> Any:
    """Return the range of samples that can lie in [-1, extent]; a region may be far larger."""
    real = type(start)
    step = length / real(samples) if samples else real(0)
    if samples <= 4 or step == 0:
        return 0, samples
    a = (real(-1) - start) / step
    b = (real(extent) - start) / step
    low, high = (a, b) if a < b else (b, a)
    return _clamped(low - 2, samples), _clamped(high + 2, samples)


@exact
def _shift(gamma: Any, region: Any, offset: Any) -> Any:
    """Return the distance by which an offset moves a bin.

    No offset moves nothing and an infinite one moves a bin out of reach, even if `gamma * region` is infinite or 0.
    """
    return (gamma * region) * offset if np.isfinite(offset) and offset != 0 else offset


@exact
def _add_axis_weights(
    low: Any, high: Any, scale: Any, gamma: Any, offset: Any, bin: int, bins: int, ratio: int, extent: int,
    weights: Any, slopes: Any,
) -> Any:  # fmt: skip
    """Add the weights of a bin's samples along one axis to `weights` and `slopes`, by pixel.

    Return the first pixel, the last pixel + 1, the number of samples, the length of the region, and True for a NaN
    position.
    """
    real = type(scale)
    start = scale * low - real(0.5)
    region = (scale * high - real(0.5)) - start
    length = region / real(bins)
    position = (start + real(bin) * length) + _shift(gamma, region, offset)
    if not np.isfinite(region) or np.isnan(position):
        return 0, 0, 0, region, True
    samples = _sample_count(length, ratio)
    first, last = _sample_range(position, length, samples, extent)
    low_pixel, high_pixel = extent, 0
    for i in range(first, last):
        at = position + (real(i) + real(0.5)) * length / real(samples)
        if at >= real(-1) and at <= real(extent):
            clamped = at if at > 0 else real(0)
            pixel = smaller(np.intp(clamped), extent - 1)
            low_pixel = smaller(low_pixel, pixel)
            if pixel + 1 < extent:
                fraction = clamped - real(pixel)
                weights[pixel] += real(1) - fraction
                weights[pixel + 1] += fraction
                if at >= 0:
                    slopes[pixel] -= real(1)
                    slopes[pixel + 1] += real(1)
                high_pixel = larger(high_pixel, pixel + 2)
            else:
                weights[pixel] += real(1)
                high_pixel = larger(high_pixel, pixel + 1)
    return low_pixel, high_pixel, samples, region, False


@inner()
def _list_pixels(
    sizes: Any, scale: Any, gamma: Any, rois: Any, offset: Any, r: int, bin: int, axes: Any, pixels: Any, weights: Any
) -> Any:
    """Fill the pixel list of a bin.

    Return the length of the list, 1 / samples, the height and width of the region, and True for a NaN bin.
    """
    H, W, P, Q, ratio = sizes
    real = type(scale)
    dx = offset[r, 0, bin] if offset.size else real(0)
    dy = offset[r, 1, bin] if offset.size else real(0)
    top, bottom, samples_y, height, nan_y = _add_axis_weights(
        rois[r, 2], rois[r, 4], scale, gamma, dy, bin // Q, P, ratio, H, axes[0], axes[1]
    )
    left, right, samples_x, width, nan_x = _add_axis_weights(
        rois[r, 1], rois[r, 3], scale, gamma, dx, bin % Q, Q, ratio, W, axes[2], axes[3]
    )
    length = 0
    for y in range(top, bottom):
        if axes[0, y] != 0 or axes[1, y] != 0:
            for x in range(left, right):
                if axes[2, x] != 0 or axes[3, x] != 0:
                    pixels[length] = y * W + x
                    weights[0, length] = axes[0, y] * axes[2, x]
                    weights[1, length] = axes[1, y] * axes[2, x]
                    weights[2, length] = axes[0, y] * axes[3, x]
                    length += 1
    axes[0:2, top:bottom] = 0
    axes[2:4, left:right] = 0
    samples = real(samples_y) * real(samples_x)
    share = real(1) / samples if samples > 1 else real(1)
    return length, share, height, width, nan_y or nan_x


@inner()
def _pixel_or_zero(weight: Any, pixel: int, zero: int) -> int:
    """Return the pixel, or the zero pixel if the weight is 0: an infinite or NaN pixel must not contribute."""
    return pixel if weight != 0 else zero


@kernel
def region_costs(sizes: Any, scale: Any, rois: Any, costs: Any, begin: int, end: int) -> None:
    """Estimate the samples per bin of each region, as far as they are near the image; a work item is a region."""
    H, W, P, Q, ratio = sizes
    real = type(scale)
    for r in range(begin, end):
        cost = real(1)
        for axis, bins, extent in ((1, Q, W), (2, P, H)):
            start = scale * rois[r, axis] - real(0.5)
            length = (scale * rois[r, axis + 2] - real(0.5) - start) / real(bins)
            if np.isfinite(length):
                cost *= real(smaller(_sample_count(length, ratio), 2 * extent + 4))
        costs[r] = cost


@kernel
def pool_bins(
    sizes: Any, scale: Any, gamma: Any, images: Any, rois: Any, offset: Any, mask: Any, image: Any, order: Any,
    out: Any, axes: Any, pixels: Any, weights: Any, row: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Pool into `out` [R, C, P*Q]; work item i is row ``order[i] % P`` of the bins of region ``order[i] // P``.

    `row` [Q, C] is scratch memory of the thread.
    """
    P, Q = sizes[2:4]
    zero = image.shape[1] - 1
    real = type(scale)
    for item in range(begin, end):
        r, p = order[item] // P, order[item] % P
        n = images[r]
        for q in range(Q):
            bin = p * Q + q
            length, share, _, _, nan = _list_pixels(sizes, scale, gamma, rois, offset, r, bin, axes, pixels, weights)
            factor = share * mask[r, bin] if mask.size else share
            sums = row[q]
            sums[:] = real(math.nan) if nan else real(0)
            if factor == 0:
                length = 0
            for i in range(length, (length + 3) // 4 * 4):
                pixels[i] = zero
                weights[0, i] = 0
            for i in range(0, length, 4):
                w0, w1, w2, w3 = weights[0, i], weights[0, i + 1], weights[0, i + 2], weights[0, i + 3]
                x0 = image[n, _pixel_or_zero(w0, pixels[i], zero)]
                x1 = image[n, _pixel_or_zero(w1, pixels[i + 1], zero)]
                x2 = image[n, _pixel_or_zero(w2, pixels[i + 2], zero)]
                x3 = image[n, _pixel_or_zero(w3, pixels[i + 3], zero)]
                for c in range(sums.shape[0]):
                    sums[c] += (w0 * x0[c] + w1 * x1[c]) + (w2 * x2[c] + w3 * x3[c])
            for c in range(sums.shape[0]):
                sums[c] *= factor
        for c in range(row.shape[1]):
            for q in range(Q):
                out[r, c, p * Q + q] = row[q, c]


@inner("reassoc", "nsz")
def _dot(a: Any, b: Any) -> Any:
    total = a.dtype.type(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@inner()
def _masked_product(factor: Any, value: Any) -> Any:
    """Return a product that is 0 if the factor is 0, even for an infinite or NaN value."""
    return factor * value if factor != 0 else type(factor)(0)


@kernel
def sampling_gradients(
    sizes: Any, scale: Any, gamma: Any, images: Any, rois: Any, offset: Any, mask: Any, image: Any, order: Any,
    first: int, grad_out: Any, grad_offset: Any, grad_mask: Any,
    axes: Any, pixels: Any, weights: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Compute the offset and mask gradients; work items as in `pool_bins`.

    Parameters
    ----------
    grad_out : array [regions, P*Q, C]
        Channels-last, for the regions from `first` on.
    grad_offset : array [R, 2, P*Q], or empty
    grad_mask : array [R, P*Q], or empty
    """
    P, Q = sizes[2:4]
    real = type(scale)
    for item in range(begin, end):
        r, p = order[item] // P, order[item] % P
        n = images[r]
        for bin in range(p * Q, (p + 1) * Q):
            length, share, height, width, nan = _list_pixels(
                sizes, scale, gamma, rois, offset, r, bin, axes, pixels, weights
            )
            value = slope_y = slope_x = real(math.nan) if nan else real(0)
            for i in range(length):
                dot = _dot(grad_out[r - first, bin], image[n, pixels[i]])
                value += _masked_product(weights[0, i], dot)
                slope_y += _masked_product(weights[1, i], dot)
                slope_x += _masked_product(weights[2, i], dot)
            if grad_mask.size:
                grad_mask[r, bin] = share * value
            if grad_offset.size:
                factor = gamma * (share * mask[r, bin] if mask.size else share)
                # A slope of 0 stays 0 for an infinite factor as well.
                grad_offset[r, 0, bin] = slope_x if nan or slope_x == 0 else _masked_product(factor * width, slope_x)
                grad_offset[r, 1, bin] = slope_y if nan or slope_y == 0 else _masked_product(factor * height, slope_y)


@kernel
def scatter_bins(
    sizes: Any, scale: Any, gamma: Any, images: Any, rois: Any, offset: Any, mask: Any, first: int, grad_out: Any,
    grad_image: Any, axes: Any, pixels: Any, weights: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Scatter the gradients of the regions from `first` on to the input gradient; a work item is a channel.

    The terms of each element are added in the order of the bins.

    Parameters
    ----------
    grad_out : array [regions, P*Q, C]
    grad_image : array [N, H*W + 1, C]
    """
    P, Q = sizes[2:4]
    for r in range(first, first + grad_out.shape[0]):
        n = images[r]
        for bin in range(P * Q):
            length, share, _, _, nan = _list_pixels(sizes, scale, gamma, rois, offset, r, bin, axes, pixels, weights)
            factor = share * mask[r, bin] if mask.size else share
            if factor == 0 or nan:
                continue
            gradient = grad_out[r - first, bin, begin:end]
            for i in range(length):
                weight = weights[0, i] * factor
                if weight != 0:
                    target = grad_image[n, pixels[i], begin:end]
                    for c in range(end - begin):
                        target[c] += weight * gradient[c]
