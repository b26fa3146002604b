"""Compiled loops of deformable convolution on the CPU.

Every kernel processes the work items ``begin <= item < end``, releases the GIL, and writes no element that another item
writes, so that the result does not depend on the split over threads. Arrays must be C-contiguous, aligned and writable
(there is one compiled variant per dtype), and all float32 or all float64.

A block is a range of ``width = Gb*cw`` channels: either `Gb` whole weight groups, or `cw` channels of one group. The
output pixels of a chunk of images have one running index q.

Arguments that the kernels share:

sizes : tuple of int
    H, W, ow, kh, kw, sh, sw, dh, dw, pad_top, pad_left, and the channels per deformable group.
image : array [n, H*W + 1, width]
    Channels-last with a zero pixel at the end. Corners that must not contribute point to the zero pixel, which keeps
    the inner loops free of branches.
offset : array [n, 2*D*K, oh*ow]
mask : array [n, D*K, oh*ow], or empty
weight : array [O, C/G, K]
gradients : array [Gb, >= last - first, >= K*cw rounded up to lanes]
    Gradients of the im2col columns of output pixels from `first` on, written by `column_gradients`.
c0, o0 : int
    First input and output channel of the block.
g0, cw, og : int
    First weight group of the block, its channels per weight group, and the output channels per weight group.
samples : tuple of array
    Scratch memory of the thread for the sampling points of a strip; see `_locate_samples`.
"""

from __future__ import annotations

from typing import Any

from dcnops._backends.cpu.compiled import inner, larger, smaller, vector_kernel
from dcnops._backends.cpu.locate_strip import locate_strip
from dcnops._backends.cpu.vectors import (
    DEPTH,
    ROWS,
    STRIP,
    blend_strip,
    dot_strip,
    scatter_strip,
    tile_product,
    transpose,
)

OUTPUTS = 16
"""Output channels that are transposed together: planes of the output that share few sets of the first-level cache."""


@inner()
def _strip_length(sizes: Any, p: int, last: int) -> Any:
    """Return the length of the strip of output pixels that starts at p and ends before `last`."""
    return smaller(smaller(STRIP, last - p), sizes[2] - p % sizes[2])


@inner()
def _locate_samples(sizes: Any, offset: Any, mask: Any, samples: Any, d: int, n: int, p: int, count: int) -> None:
    """Locate the sampling points of group d for a strip of output pixels.

    Parameters
    ----------
    samples : tuple of array
        corners [K*8*STRIP] int32, for each tap: pixels (y, x), (y, x+1), (y+1, x), (y+1, x+1) of the image; the zero
        pixel for corners outside the image and samples outside the open box. Then the same once more, with the zero
        pixel also for corners without weight.
        weights [K*11*STRIP], for each tap: the four corner weights (bilinear times mask), ly, lx, and the mask, which
        is 1 outside the open box. A NaN coordinate makes the first six NaN. The last four are free for sums over
        channels.
    """
    H, W, ow, kh, kw, sh, sw, dh, dw, pad_top, pad_left, _ = sizes
    corners, weights = samples
    pixels = offset.shape[2]
    a = p // ow
    b = p - a * ow
    for k in range(kh * kw):
        i = k // kw
        j = k - i * kw
        tap = d * kh * kw + k
        row = n * offset.shape[1] + 2 * tap
        locate_strip(
            offset, row * pixels + p, (row + 1) * pixels + p, mask, row // 2 * pixels + p, mask.size > 0,
            corners, 8 * k * STRIP, weights, 11 * k * STRIP,
            a * sh - pad_top + i * dh, b * sw - pad_left + j * dw, sw, H, W, count,
        )  # fmt: skip


@inner()
def _fill_columns(
    image: Any, samples: Any, columns: Any, row: int, c0: int, cd: int, cw: int, d: int, n: int, count: int
) -> None:
    """Fill ``columns[g, row + t, k*cw + c]`` of a located strip for the channels of group d in the block."""
    corners, weights = samples
    rows, length = columns.shape[1:]
    extent, width = image.shape[1:]
    begin = larger(0, d * cd - c0)
    end = smaller(width, (d + 1) * cd - c0)
    weight_groups = range(begin // cw, (end - 1) // cw + 1)
    for k in range(corners.size // (8 * STRIP)):
        for g in weight_groups:
            low = larger(begin, g * cw)
            # Corners without weight are not read, so that infinity and NaN there have no effect.
            blend_strip(
                image, n * extent * width + low, width, corners, (8 * k + 4) * STRIP, weights, 11 * k * STRIP,
                columns, (g * rows + row) * length + (k - g) * cw + low, length, count,
                smaller(end, (g + 1) * cw) - low,
            )  # fmt: skip


@vector_kernel
def output_tile(
    sizes: Any, image: Any, offset: Any, mask: Any, packed: Any, bias: Any, out: Any, c0: int, cw: int, o0: int,
    og: int, add: bool, tile: int, samples: Any, columns: Any, products: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Write the output of one block of channels to `out`, or add it; a work item is `tile` output pixels.

    Parameters
    ----------
    packed : array [Gb, panels, K*cw, lanes]
        From `transpose_loops.pack_weight`.
    bias : array [O]
    out : array [n, O, oh*ow]
    tile : int
        A multiple of ROWS.
    columns : array [Gb, tile, K*cw], products : array [Gb, tile, panels*lanes]
        Scratch memory of the thread.
    """
    O, pixels = out.shape[1:]
    cd = sizes[11]
    Gb, panels, length, lanes = packed.shape
    stride = panels * lanes
    for item in range(begin, end):
        first = item * tile
        last = smaller(first + tile, out.shape[0] * pixels)
        q = first
        while q < last:
            n = q // pixels
            p = q - n * pixels
            count = _strip_length(sizes, p, p + last - q)
            for d in range(c0 // cd, (c0 + image.shape[2] - 1) // cd + 1):
                _locate_samples(sizes, offset, mask, samples, d, n, p, count)
                _fill_columns(image, samples, columns, q - first, c0, cd, cw, d, n, count)
            q += count
        for g in range(Gb):
            q = first
            while q < last:
                n = q // pixels
                count = smaller(last - q, (n + 1) * pixels - q)
                if add:
                    for o in range(0, og, OUTPUTS):
                        transpose(
                            out, (n * O + o0 + g * og + o) * pixels + q - n * pixels, pixels,
                            smaller(OUTPUTS, og - o), count,
                            products, (g * tile + q - first) * stride + o, stride, 0, 1,
                        )  # fmt: skip
                else:
                    for row in range(q - first, q - first + count):
                        for o in range(og):
                            products[g, row, o] = bias[o0 + g * og + o]
                q += count
            for k in range(0, length, DEPTH):
                for panel in range(panels):
                    for row in range(0, last - first, ROWS):
                        tile_product(
                            columns, (g * tile + row) * length + k, length, 1, last - first - row,
                            packed, ((g * panels + panel) * length + k) * lanes, lanes,
                            products, (g * tile + row) * stride + panel * lanes, stride,
                            smaller(DEPTH, length - k), True,
                        )  # fmt: skip
            q = first
            while q < last:
                n = q // pixels
                count = smaller(last - q, (n + 1) * pixels - q)
                for o in range(0, og, OUTPUTS):
                    transpose(
                        products, (g * tile + q - first) * stride + o, stride, count, smaller(OUTPUTS, og - o),
                        out, (n * O + o0 + g * og + o) * pixels + q - n * pixels, pixels, 0, 1,
                    )  # fmt: skip
                q += count


@vector_kernel
def column_gradients(
    grad_out: Any, packed: Any, gradients: Any, o0: int, first: int, last: int, tile: int, begin: int, end: int
) -> None:
    """Compute the column gradients of the output pixels ``first <= q < last``; a work item is `tile` pixels.

    Parameters
    ----------
    grad_out : array [n*oh*ow, O]
        Channels-last.
    packed : array [Gb, panels, og, lanes]
        ``packed[g, panel, o, lane] = weight[(g0+g)*og + o, c0 + c, k]`` with k*cw + c = panel*lanes + lane, or 0.
    gradients : array
        Has rows for `last - first` rounded up to ROWS.
    """
    O = grad_out.shape[1]
    Gb, panels, og, lanes = packed.shape
    rows, stride = gradients.shape[1:]
    for item in range(begin, end):
        low = item * tile
        high = smaller(low + tile, last - first)
        for g in range(Gb):
            for o in range(0, og, DEPTH):
                for panel in range(panels):
                    for row in range(low, high, ROWS):
                        tile_product(
                            grad_out, (first + row) * O + o0 + g * og + o, O, 1, high - row,
                            packed, ((g * panels + panel) * og + o) * lanes, lanes,
                            gradients, (g * rows + row) * stride + panel * lanes, stride,
                            smaller(DEPTH, og - o), o > 0,
                        )  # fmt: skip


@vector_kernel
def weight_gradient(
    grad_out: Any, columns: Any, gradient: Any, panels: int, o0: int, og: int, first: int, last: int, begin: int,
    end: int,
) -> None:  # fmt: skip
    """Add the terms of the output pixels ``first <= q < last`` to the weight gradient of one block.

    A work item is one g and panel.

    Parameters
    ----------
    grad_out : array [n, O, oh*ow]
    columns : array [Gb, >= last - first, >= panels*lanes]
    gradient : array [Gb, og rounded up to ROWS, panels*lanes]
    """
    O, pixels = grad_out.shape[1:]
    span, stride = columns.shape[1:]
    rows, padded = gradient.shape[1:]
    for item in range(begin, end):
        g = item // panels
        column = (item - g * panels) * (padded // panels)
        q = first
        while q < last:
            n = q // pixels
            p = q - n * pixels
            number = smaller(smaller(DEPTH, last - q), pixels - p)
            for o in range(0, og, ROWS):
                tile_product(
                    grad_out, (n * O + o0 + g * og + o) * pixels + p, pixels, 1, og - o,
                    columns, (g * span + q - first) * stride + column, stride,
                    gradient, (g * rows + o) * padded + column, padded,
                    number, True,
                )  # fmt: skip
            q += number


@inner()
def _masked_product(factor: Any, value: Any) -> Any:
    """Return a product that is 0 if the factor is 0, even for an infinite or NaN value."""
    return factor * value if factor != 0 else type(factor)(0)


@inner()
def _add_sampling_gradients(
    image: Any, samples: Any, gradients: Any, row: int, grad_offset: Any, grad_mask: Any, c0: int, cd: int, cw: int,
    d: int, n: int, p: int, count: int,
) -> None:  # fmt: skip
    """Add the offset and mask gradients of group d for the strip of output pixels that starts at (n, p)."""
    corners, weights = samples
    K = corners.size // (8 * STRIP)
    rows, padded = gradients.shape[1:]
    extent, width = image.shape[1:]
    zero = extent - 1
    real = image.dtype.type
    begin = larger(0, d * cd - c0)
    end = smaller(width, (d + 1) * cd - c0)
    weight_groups = range(begin // cw, (end - 1) // cw + 1)
    for k in range(K):
        for i in range((11 * k + 7) * STRIP, 11 * (k + 1) * STRIP):
            weights[i] = 0
        for g in weight_groups:
            low = larger(begin, g * cw)
            dot_strip(
                image, n * extent * width + low, width, corners, 8 * k * STRIP, weights, (11 * k + 7) * STRIP,
                gradients, (g * rows + row) * padded + (k - g) * cw + low, padded, count,
                smaller(end, (g + 1) * cw) - low,
            )  # fmt: skip
        offset_y = grad_offset[n, 2 * (d * K + k), p : p + count]
        offset_x = grad_offset[n, 2 * (d * K + k) + 1, p : p + count]
        modulations = grad_mask[n, d * K + k, p : p + count] if grad_mask.size else offset_y
        for t in range(count):
            c = 8 * k * STRIP + t
            w = 11 * k * STRIP + t
            # The product of an infinite gradient and the zero pixel must not be NaN.
            s00 = weights[w + 7 * STRIP] if corners[c] != zero else real(0)
            s01 = weights[w + 8 * STRIP] if corners[c + STRIP] != zero else real(0)
            s10 = weights[w + 9 * STRIP] if corners[c + 2 * STRIP] != zero else real(0)
            s11 = weights[w + 10 * STRIP] if corners[c + 3 * STRIP] != zero else real(0)
            ly = weights[w + 4 * STRIP]
            lx = weights[w + 5 * STRIP]
            modulation = weights[w + 6 * STRIP]
            hy = real(1) - ly
            hx = real(1) - lx
            dy = _masked_product(hx, s10 - s00) + _masked_product(lx, s11 - s01)
            dx = _masked_product(hy, s01 - s00) + _masked_product(ly, s11 - s10)
            offset_y[t] += _masked_product(modulation, dy)
            offset_x[t] += _masked_product(modulation, dx)
            if grad_mask.size:
                top = _masked_product(hy * hx, s00) + _masked_product(hy * lx, s01)
                modulations[t] += top + _masked_product(ly * hx, s10) + _masked_product(ly * lx, s11)


@vector_kernel
def sampling_gradients(
    sizes: Any, image: Any, offset: Any, mask: Any, gradients: Any, columns: Any, grad_offset: Any, grad_mask: Any,
    c0: int, cw: int, first: int, samples: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Add the offset and mask gradients of one block, and fill the columns that its weight gradient needs.

    A work item is an output pixel, counted from `first`. `columns` has the shape of `gradients`, `grad_offset` and
    `grad_mask` those of `offset` and `mask`; each may be empty.
    """
    pixels = offset.shape[2]
    cd = sizes[11]
    q = first + begin
    while q < first + end:
        n = q // pixels
        p = q - n * pixels
        count = _strip_length(sizes, p, p + first + end - q)
        for d in range(c0 // cd, (c0 + image.shape[2] - 1) // cd + 1):
            _locate_samples(sizes, offset, mask, samples, d, n, p, count)
            if grad_offset.size:
                _add_sampling_gradients(
                    image, samples, gradients, q - first, grad_offset, grad_mask, c0, cd, cw, d, n, p, count
                )  # fmt: skip
            if columns.size:
                _fill_columns(image, samples, columns, q - first, c0, cd, cw, d, n, count)
        q += count


@vector_kernel
def scatter_columns(
    sizes: Any, offset: Any, mask: Any, gradients: Any, grad_image: Any, c0: int, cw: int, first: int, last: int,
    samples: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Scatter the column gradients of the output pixels ``first <= q < last`` to the image gradient.

    A work item is a channel of the block, so that no two threads write the same element. The terms of each element are
    added in the same order for any split. `grad_image` has the shape of `image`; its last pixel is undefined.
    """
    corners, weights = samples
    pixels = offset.shape[2]
    cd = sizes[11]
    rows, padded = gradients.shape[1:]
    extent, width = grad_image.shape[1:]
    q = first
    while q < last:
        n = q // pixels
        p = q - n * pixels
        count = _strip_length(sizes, p, p + last - q)
        for d in range((c0 + begin) // cd, (c0 + end - 1) // cd + 1):
            low_channel = larger(begin, d * cd - c0)
            high_channel = smaller(end, (d + 1) * cd - c0)
            weight_groups = range(low_channel // cw, (high_channel - 1) // cw + 1)
            _locate_samples(sizes, offset, mask, samples, d, n, p, count)
            for k in range(corners.size // (8 * STRIP)):
                for g in weight_groups:
                    low = larger(low_channel, g * cw)
                    # Corners without weight get nothing, not even the product with an infinite gradient.
                    scatter_strip(
                        grad_image, n * extent * width + low, width, corners, (8 * k + 4) * STRIP,
                        weights, 11 * k * STRIP,
                        gradients, (g * rows + q - first) * padded + (k - g) * cw + low, padded,
                        count, smaller(high_channel, (g + 1) * cw) - low,
                    )  # fmt: skip
        q += count
