"""Compiled loops of multi-scale deformable attention and deformable aggregation on the CPU.

Both operations sample a few points per query and head, multiply by a weight and add up. They differ only in the formula
of the positions, which is ``origin + step*index + scale*(base + offset)`` along each axis.

As in `deform_conv2d_loops`, kernels process the work items ``begin <= item < end``, release the GIL, and write no
element that another item writes. Arrays are C-contiguous and, apart from those of int32, of one dtype.

Arguments that the kernels share:

sizes : tuple of int
    Queries per image, queries per row (of an output image), vertical and horizontal step from query to query, heads,
    points per head, elements from head to head in an array of offsets and in one of weights, and the first element of
    the weights.
origin : tuple of float
    Vertical and horizontal origin of the positions.
levels : array of int32 [strips, 3*STRIP], scales : array [strips, 4*STRIP]
    Tables of the points of a head in strips of STRIP points: height, width and first pixel of the level; vertical and
    horizontal scale, vertical and horizontal base.
value : array [N, S, heads, D]
offset : array [N*Lq, elements]
    Pairs (x, y).
weight : array [N*Lq, elements]
pixels : array of int32 [2*STRIP], fractions : array [2*STRIP]
    Scratch memory of the thread for the points of a strip; see `_locate_samples`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dcnops._backends.cpu.compiled import exact, inner, kernel, prefetch, smaller

STRIP = 32
"""Maximum number of points that are located together."""

_TOP_LEFT, _TOP_RIGHT, _BOTTOM_LEFT, _BOTTOM_RIGHT, _NAN = 1, 2, 4, 8, 16
_INSIDE = 15


@exact
def _locate_samples(
    sizes: Any, origin: Any, levels: Any, scales: Any, offset: Any, pixels: Any, fractions: Any, q: int, first: int,
    count: int,
) -> None:  # fmt: skip
    """Locate `count` points of query q, with the offsets from element `first` on.

    The compiler vectorises the loop only if the stores into one array are constant distances apart.

    Parameters
    ----------
    levels, scales : array
        Row of the tables.
    pixels : array
        Pixel at the top left of each point, and flags of the corners that are inside the level. Points outside the open
        box have no flag, points with a NaN coordinate have `_NAN`.
    fractions : array
        Vertical and horizontal distance from the top left corner.
    """
    real = scales.dtype.type
    one = real(1)
    a = q // sizes[1]
    pairs = offset[first : first + 2 * count]
    origin_y = origin[0] + real(a * sizes[2])
    origin_x = origin[1] + real((q - a * sizes[1]) * sizes[3])
    for k in range(count):
        height = levels[k]
        width = levels[STRIP + k]
        py = origin_y + scales[k] * (scales[2 * STRIP + k] + pairs[2 * k + 1])
        px = origin_x + scales[STRIP + k] * (scales[3 * STRIP + k] + pairs[2 * k])
        inside = (py > -one) & (py < real(height)) & (px > -one) & (px < real(width))
        nan = (py != py) | (px != px)
        fy = np.floor(py) if inside else real(0)
        fx = np.floor(px) if inside else real(0)
        fractions[k] = py - fy
        fractions[STRIP + k] = px - fx
        y = np.int32(fy)
        x = np.int32(fx)
        rows = (np.int32(3) if y >= 0 else np.int32(0)) | (np.int32(12) if y < height - 1 else np.int32(0))
        columns = (np.int32(5) if x >= 0 else np.int32(0)) | (np.int32(10) if x < width - 1 else np.int32(0))
        outside = np.int32(_NAN) if nan else np.int32(0)
        pixels[k] = levels[2 * STRIP + k] + y * width + x
        pixels[STRIP + k] = rows & columns if inside else outside


@inner()
def _prefetch_samples(value: Any, levels: Any, pixels: Any, count: int, n: int, m: int) -> None:
    """Begin to load the pixels around `count` points, which are scattered over more memory than the caches hold."""
    _, S, M, D = value.shape
    for k in range(count):
        if pixels[STRIP + k] == _INSIDE:
            top = ((n * S + pixels[k]) * M + m) * D
            bottom = top + levels[STRIP + k] * M * D
            prefetch(value, top, D)
            prefetch(value, top + M * D, D)
            prefetch(value, bottom, D)
            prefetch(value, bottom + M * D, D)


@inner()
def _masked_product(factor: Any, value: Any) -> Any:
    """Return a product that is 0 if the factor is 0, even for an infinite or NaN value."""
    return factor * value if factor != 0 else type(factor)(0)


@inner()
def _add_scaled(target: Any, scale: Any, row: Any) -> None:
    for c in range(row.shape[0]):
        target[c] += scale * row[c]


@inner()
def _add_corners(target: Any, w0: Any, w1: Any, w2: Any, w3: Any, r0: Any, r1: Any, r2: Any, r3: Any) -> None:
    for c in range(target.shape[0]):
        target[c] += (w0 * r0[c] + w1 * r1[c]) + (w2 * r2[c] + w3 * r3[c])


@kernel
def sum_samples(
    sizes: Any, origin: Any, levels: Any, scales: Any, value: Any, offset: Any, weight: Any, out: Any,
    is_scattered: bool, pixels: Any, fractions: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Compute the weighted sums `out` [N*Lq, heads, D]; a work item is a query.

    Parameters
    ----------
    is_scattered : bool
        Whether the samples of successive queries rarely share pixels, so that most pixels are read from memory.
    """
    Lq, _, _, _, M, K, offset_stride, weight_stride, weight_start = sizes
    real = value.dtype.type
    one = real(1)
    for item in range(begin, end):
        n = item // Lq
        for m in range(M):
            sums = out[item, m]
            sums[:] = real(0)
            for k0 in range(0, K, STRIP):
                count = smaller(STRIP, K - k0)
                strip = k0 // STRIP
                _locate_samples(
                    sizes, origin, levels[strip], scales[strip], offset[item], pixels, fractions, item - n * Lq,
                    m * offset_stride + 2 * k0, count,
                )  # fmt: skip
                if is_scattered:
                    _prefetch_samples(value, levels[strip], pixels, count, n, m)
                for k in range(count):
                    corners = pixels[STRIP + k]
                    factor = weight[item, weight_start + m * weight_stride + k0 + k]
                    pixel = pixels[k]
                    width = levels[strip, STRIP + k]
                    if corners == _NAN:
                        sums[:] = real(math.nan)
                    elif corners and factor != 0:
                        ly = fractions[k]
                        lx = fractions[STRIP + k]
                        hy = one - ly
                        hx = one - lx
                        w00 = _masked_product(hy * hx, factor)
                        w01 = _masked_product(hy * lx, factor)
                        w10 = _masked_product(ly * hx, factor)
                        w11 = _masked_product(ly * lx, factor)
                        # Corners without weight are not read, so that infinity and NaN there have no effect.
                        if corners == _INSIDE and w00 != 0 and w01 != 0 and w10 != 0 and w11 != 0:
                            _add_corners(
                                sums, w00, w01, w10, w11,
                                value[n, pixel, m], value[n, pixel + 1, m],
                                value[n, pixel + width, m], value[n, pixel + width + 1, m],
                            )  # fmt: skip
                        else:
                            for corner in range(4):
                                w = (w00 if corner == 0 else w01) if corner < 2 else (w10 if corner == 2 else w11)
                                if corners & (1 << corner) and w != 0:
                                    _add_scaled(sums, w, value[n, pixel + (corner >> 1) * width + (corner & 1), m])


@inner("reassoc", "nsz")
def _corner_dots(a: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> Any:
    s0 = s1 = s2 = s3 = a.dtype.type(0)
    for i in range(a.shape[0]):
        s0 += a[i] * b0[i]
        s1 += a[i] * b1[i]
        s2 += a[i] * b2[i]
        s3 += a[i] * b3[i]
    return s0, s1, s2, s3


@kernel
def sampling_gradients(
    sizes: Any, origin: Any, levels: Any, scales: Any, value: Any, offset: Any, weight: Any, grad_out: Any,
    grad_offset: Any, grad_weight: Any, pixels: Any, fractions: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Compute the gradients of offsets and weights; a work item is a query.

    Parameters
    ----------
    grad_out : array [N*Lq, heads, D]
    grad_offset, grad_weight : array
        With the shapes of `offset` and `weight`, or empty.
    """
    Lq, _, _, _, M, K, offset_stride, weight_stride, weight_start = sizes
    real = value.dtype.type
    zero = real(0)
    one = real(1)
    for item in range(begin, end):
        n = item // Lq
        for m in range(M):
            gradient = grad_out[item, m]
            for k0 in range(0, K, STRIP):
                count = smaller(STRIP, K - k0)
                strip = k0 // STRIP
                first = m * offset_stride + 2 * k0
                _locate_samples(
                    sizes, origin, levels[strip], scales[strip], offset[item], pixels, fractions, item - n * Lq, first,
                    count,
                )  # fmt: skip
                for k in range(count):
                    corners = pixels[STRIP + k]
                    pixel = pixels[k]
                    width = levels[strip, STRIP + k]
                    index = weight_start + m * weight_stride + k0 + k
                    total = dy = dx = real(math.nan) if corners == _NAN else zero
                    if corners & _INSIDE:
                        # The dots of corners outside the level are computed for its first pixel and ignored.
                        start = levels[strip, 2 * STRIP + k]
                        i00 = pixel if corners & _TOP_LEFT else start
                        i01 = pixel + 1 if corners & _TOP_RIGHT else start
                        i10 = pixel + width if corners & _BOTTOM_LEFT else start
                        i11 = pixel + width + 1 if corners & _BOTTOM_RIGHT else start
                        s00, s01, s10, s11 = _corner_dots(
                            gradient, value[n, i00, m], value[n, i01, m], value[n, i10, m],
                            value[n, i11, m],
                        )  # fmt: skip
                        s00 = s00 if corners & _TOP_LEFT else zero
                        s01 = s01 if corners & _TOP_RIGHT else zero
                        s10 = s10 if corners & _BOTTOM_LEFT else zero
                        s11 = s11 if corners & _BOTTOM_RIGHT else zero
                        ly = fractions[k]
                        lx = fractions[STRIP + k]
                        hy = one - ly
                        hx = one - lx
                        factor = weight[item, index]
                        top = _masked_product(hy * hx, s00) + _masked_product(hy * lx, s01)
                        total = top + _masked_product(ly * hx, s10) + _masked_product(ly * lx, s11)
                        dy = _masked_product(hx, s10 - s00) + _masked_product(lx, s11 - s01)
                        dx = _masked_product(hy, s01 - s00) + _masked_product(ly, s11 - s10)
                        dy = _masked_product(factor * scales[strip, k], dy)
                        dx = _masked_product(factor * scales[strip, STRIP + k], dx)
                    if grad_weight.size:
                        grad_weight[item, index] = total
                    if grad_offset.size:
                        grad_offset[item, first + 2 * k] = dx
                        grad_offset[item, first + 2 * k + 1] = dy


@kernel
def scatter_samples(
    sizes: Any, origin: Any, levels: Any, scales: Any, offset: Any, weight: Any, grad_out: Any, grad_value: Any,
    parts: int, pixels: Any, fractions: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Add to the gradient of `value`; a work item is one of the `parts` of the channels of a head in an image.

    No two threads write the same element. The terms of each element are added in the order of the queries.

    Parameters
    ----------
    grad_out : array [N*Lq, heads*parts, D/parts]
    grad_value : array [N, S, heads*parts, D/parts]
    """
    Lq, _, _, _, M, K, offset_stride, weight_stride, weight_start = sizes
    one = grad_value.dtype.type(1)
    for item in range(begin, end):
        n = item // (M * parts)
        part = item % (M * parts)
        m = part // parts
        for q in range(Lq):
            row = n * Lq + q
            gradient = grad_out[row, part]
            for k0 in range(0, K, STRIP):
                count = smaller(STRIP, K - k0)
                strip = k0 // STRIP
                _locate_samples(
                    sizes, origin, levels[strip], scales[strip], offset[row], pixels, fractions, q,
                    m * offset_stride + 2 * k0, count,
                )  # fmt: skip
                for k in range(count):
                    corners = pixels[STRIP + k]
                    factor = weight[row, weight_start + m * weight_stride + k0 + k]
                    if corners & _INSIDE and factor != 0:
                        pixel = pixels[k]
                        width = levels[strip, STRIP + k]
                        ly = fractions[k]
                        lx = fractions[STRIP + k]
                        for corner in range(4):
                            share = (ly if corner & 2 else one - ly) * (lx if corner & 1 else one - lx)
                            w = _masked_product(share, factor)
                            if corners & (1 << corner) and w != 0:
                                _add_scaled(
                                    grad_value[n, pixel + (corner >> 1) * width + (corner & 1), part], w, gradient
                                )
