"""The compiled loops of deformable convolution on the CPU.

Every kernel works on the items ``begin <= item < end`` of its work, releases the GIL and writes nothing that another
item of the same kernel writes: any split over threads gives the same bits. Arrays must be C-contiguous, aligned and
writable (one compiled variant per dtype), float32 or float64, and of one dtype within a call.

Layouts used by all kernels. A block is a range of ``width = Gb*cw`` channels: `Gb` whole weight groups, or `cw`
channels of one group. ``image [n, H*W + 1, width]`` is channels-last, the extra pixel at its end is zero: corners
that must not take part point there, which keeps the inner loops free of branches. Output pixels of a chunk of images
have one running index q. ``columns [Gb, q, K*cw rounded up to a panel]`` is what a matrix product sees.
"""

from __future__ import annotations

import math
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dcnops._backends.cpu.compiled import inner, kernel

__all__ = [
    "DEPTH",
    "ROWS",
    "column_gradients",
    "output_tile",
    "pack_weight",
    "pack_weight_transposed",
    "panel_lanes",
    "sample_columns",
    "sampling_gradients",
    "scatter_columns",
    "unpack_weight",
    "weight_gradient",
]

ROWS = 6
"""Rows of the register tile: with two vectors a row, its 12 sums fit the 16 registers of AVX and hide the latency."""

DEPTH = 192
"""Length of the sums that a register tile takes at once: that much of a panel stays in the first-level cache."""

_VECTORS = 2
_CPU = llvmlite.binding.get_host_cpu_features()
_VECTOR_BYTES = 64 if _CPU.get("avx512f") else 32 if _CPU.get("avx") else 16


def panel_lanes(itemsize: int) -> int:
    """Columns of the register tile, the width that packed matrices are padded to."""
    return _VECTORS * _VECTOR_BYTES // itemsize


@intrinsic  # type: ignore[untyped-decorator]
def _tile_product(
    typing_context: Any,
    a: Any,
    a_start: Any,
    a_row: Any,
    a_depth: Any,
    a_rows: Any,
    b: Any,
    b_start: Any,
    b_depth: Any,
    c: Any,
    c_start: Any,
    c_row: Any,
    depth: Any,
    accumulate: Any,
) -> Any:
    """``c[r, l] (+)= sum_k a[r, k] * b[k, l]`` for ROWS rows and one panel of lanes, `depth` >= 1.

    The sums stay in registers, which no loop written in Python makes LLVM do. `*_start`, `*_row` and `*_depth` count
    elements; rows of b and c have unit stride. Only the first `a_rows` rows of a are read; what the others' products
    are is undefined.
    """
    integer = types.intp
    signature = types.void(
        a, integer, integer, integer, integer, b, integer, integer, c, integer, integer, integer, types.boolean
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_start, a_row, a_depth, a_rows, b, b_start, b_depth, c, c_start, c_row, depth, accumulate = args
        scalar = context.get_value_type(signature.args[0].dtype)
        itemsize = context.get_abi_sizeof(scalar)
        lanes = _VECTOR_BYTES // itemsize
        vector = ir.VectorType(scalar, lanes)
        index = context.get_value_type(integer)
        undefined = ir.Constant(vector, ir.Undefined)
        first_lane = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)

        def start(array: Any, array_type: Any, offset: Any) -> Any:
            return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])

        def vector_at(pointer: Any, offset: Any, number: int) -> Any:
            address = builder.gep(pointer, [builder.add(offset, index(number * lanes))])
            return builder.bitcast(address, vector.as_pointer())

        pointer_a = start(a, signature.args[0], a_start)
        pointer_b = start(b, signature.args[5], b_start)
        pointer_c = start(c, signature.args[8], c_start)
        a_offsets = [
            builder.select(builder.icmp_signed("<", index(row), a_rows), builder.mul(a_row, index(row)), index(0))
            for row in range(ROWS)
        ]
        targets = [
            vector_at(pointer_c, builder.mul(c_row, index(row)), number)
            for row in range(ROWS)
            for number in range(_VECTORS)
        ]

        before = builder.block
        load = builder.append_basic_block("load")
        loop = builder.append_basic_block("loop")
        done = builder.append_basic_block("done")
        builder.cbranch(accumulate, load, loop)
        builder.position_at_end(load)
        loaded = [builder.load(target, align=itemsize) for target in targets]
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(index)
        sums = [builder.phi(vector) for _ in targets]
        b_vectors = [
            builder.load(vector_at(pointer_b, builder.mul(k, b_depth), number), align=itemsize)
            for number in range(_VECTORS)
        ]
        a_offset = builder.mul(k, a_depth)
        products = []
        for row in range(ROWS):
            value = builder.load(builder.gep(pointer_a, [builder.add(a_offsets[row], a_offset)]))
            value = builder.insert_element(undefined, value, ir.IntType(32)(0))
            value = builder.shuffle_vector(value, undefined, first_lane)
            products += [builder.fmul(value, b_vector, flags=("contract",)) for b_vector in b_vectors]
        new_sums = [builder.fadd(old, product, flags=("contract",)) for old, product in zip(sums, products)]
        next_k = builder.add(k, index(1))
        builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, done)
        for block, value in ((before, index(0)), (load, index(0)), (loop, next_k)):
            k.add_incoming(value, block)
        for total, old, new in zip(sums, loaded, new_sums):
            total.add_incoming(ir.Constant(vector, [0.0] * lanes), before)
            total.add_incoming(old, load)
            total.add_incoming(new, loop)

        builder.position_at_end(done)
        for target, new in zip(targets, new_sums):
            builder.store(new, target, align=itemsize)
        return context.get_dummy_value()

    return signature, generate


@kernel
def pack_weight(weight: Any, packed: Any, g0: int, c0: int, cw: int, og: int, begin: int, end: int) -> None:
    """``packed[g, panel, k*cw + c, lane] = weight[(g0+g)*og + o, c0 + c, k]`` with o = panel*lanes + lane.

    An item is one g and panel.

    Parameters
    ----------
    weight : array [O, C/G, K]
    packed : array [Gb, panels, K*cw, lanes]
        Zero in lanes beyond the last o.
    """
    panels, _, lanes = packed.shape[1:]
    K = weight.shape[2]
    for item in range(begin, end):
        g = item // panels
        panel = item % panels
        for lane in range(lanes):
            o = panel * lanes + lane
            for c in range(cw):
                for k in range(K):
                    packed[g, panel, k * cw + c, lane] = weight[(g0 + g) * og + o, c0 + c, k] if o < og else 0


@kernel
def pack_weight_transposed(weight: Any, packed: Any, g0: int, c0: int, cw: int, begin: int, end: int) -> None:
    """``packed[g, panel, o, lane] = weight[(g0+g)*og + o, c0 + c, k]`` with k*cw + c = panel*lanes + lane.

    An item is one g and o.

    Parameters
    ----------
    weight : array [O, C/G, K]
    packed : array [Gb, panels, og, lanes]
        Zero in lanes beyond the last (k, c).
    """
    panels, og, lanes = packed.shape[1:]
    K = weight.shape[2]
    for item in range(begin, end):
        g = item // og
        o = item % og
        for column in range(K * cw, panels * lanes):
            packed[g, column // lanes, o, column % lanes] = 0
        for c in range(cw):
            for k in range(K):
                column = k * cw + c
                packed[g, column // lanes, o, column % lanes] = weight[(g0 + g) * og + o, c0 + c, k]


@kernel
def unpack_weight(gradient: Any, weight: Any, g0: int, c0: int, cw: int, og: int, begin: int, end: int) -> None:
    """``weight[(g0+g)*og + o, c0 + c, k] = gradient[g, o, k*cw + c]``; an item is one g and o.

    Parameters
    ----------
    gradient : array [Gb, >= og, >= K*cw]
    weight : array [O, C/G, K]
    """
    K = weight.shape[2]
    for item in range(begin, end):
        g = item // og
        o = item % og
        for c in range(cw):
            for k in range(K):
                weight[(g0 + g) * og + o, c0 + c, k] = gradient[g, o, k * cw + c]


@inner()
def _locate(sizes: Any, offset: Any, d: int, i: int, j: int, n: int, p: int, a: int, b: int) -> Any:
    """Where tap (i, j) of group d samples for output pixel p = (a, b): inside the open box, NaN, y0, x0, ly, lx."""
    H, W, _, kh, kw, sh, sw, dh, dw, pad_top, pad_left, _ = sizes
    real = offset.dtype.type
    channel = 2 * ((d * kh + i) * kw + j)
    py = real(a * sh - pad_top + i * dh) + offset[n, channel, p]
    px = real(b * sw - pad_left + j * dw) + offset[n, channel + 1, p]
    if py > real(-1) and py < real(H) and px > real(-1) and px < real(W):
        fy = np.floor(py)
        fx = np.floor(px)
        return True, False, int(fy), int(fx), py - fy, px - fx
    return False, py != py or px != px, 0, 0, real(0), real(0)


@inner()
def _corners(sizes: Any, y: int, x: int) -> Any:
    """Pixels (y, x), (y, x+1), (y+1, x), (y+1, x+1); the zero pixel for those outside of the image."""
    H, W = sizes[:2]
    zero = H * W
    i = y * W + x
    top, bottom = y >= 0, y < H - 1
    left, right = x >= 0, x < W - 1
    return (
        i if top and left else zero,
        i + 1 if top and right else zero,
        i + W if bottom and left else zero,
        i + W + 1 if bottom and right else zero,
    )


@inner()
def _weighted(pixel: int, bilinear: Any, modulation: Any, zero: int) -> Any:
    """Pixel and weight of a corner; one of weight zero becomes the zero pixel, whatever its value was."""
    weight = bilinear * modulation
    if bilinear == 0 or weight == 0 or pixel == zero:
        return zero, type(weight)(0)
    return pixel, weight


@inner()
def _weighted_corners(sizes: Any, mask: Any, d: int, k: int, n: int, p: int, y: int, x: int, ly: Any, lx: Any) -> Any:
    """The four corners with their weights, bilinear times mask."""
    real = mask.dtype.type
    modulation = mask[n, d * sizes[3] * sizes[4] + k, p] if mask.size else real(1)
    zero = sizes[0] * sizes[1]
    hy = real(1) - ly
    hx = real(1) - lx
    i00, i01, i10, i11 = _corners(sizes, y, x)
    i00, w00 = _weighted(i00, hy * hx, modulation, zero)
    i01, w01 = _weighted(i01, hy * lx, modulation, zero)
    i10, w10 = _weighted(i10, ly * hx, modulation, zero)
    i11, w11 = _weighted(i11, ly * lx, modulation, zero)
    return i00, i01, i10, i11, w00, w01, w10, w11


@inner()
def _sample(sizes: Any, image: Any, offset: Any, mask: Any, columns: Any, c0: int, cw: int, first: int, q: int) -> None:
    """Fill the row of output pixel q, ``columns[:, q - first]``."""
    ow, kh, kw = sizes[2:5]
    cd = sizes[11]
    real = image.dtype.type
    width = image.shape[2]
    zero = image.shape[1] - 1
    n = q // offset.shape[2]
    p = q - n * offset.shape[2]
    a = p // ow
    b = p - a * ow
    for d in range(c0 // cd, (c0 + width - 1) // cd + 1):
        begin = max(0, d * cd - c0)
        end = min(width, (d + 1) * cd - c0)
        first_g = begin // cw
        last_g = (end - 1) // cw
        for i in range(kh):
            for j in range(kw):
                k = i * kw + j
                inside, nan, y, x, ly, lx = _locate(sizes, offset, d, i, j, n, p, a, b)
                i00 = i01 = i10 = i11 = zero
                w00 = w01 = w10 = w11 = real(math.nan if nan else 0)
                if inside:
                    i00, i01, i10, i11, w00, w01, w10, w11 = _weighted_corners(sizes, mask, d, k, n, p, y, x, ly, lx)
                for g in range(first_g, last_g + 1):
                    low = max(begin, g * cw)
                    high = min(end, (g + 1) * cw)
                    x00 = image[n, i00, low:high]
                    x01 = image[n, i01, low:high]
                    x10 = image[n, i10, low:high]
                    x11 = image[n, i11, low:high]
                    row = columns[g, q - first, k * cw + low - g * cw : k * cw + high - g * cw]
                    for c in range(high - low):
                        row[c] = w00 * x00[c] + w01 * x01[c] + w10 * x10[c] + w11 * x11[c]


@kernel
def output_tile(
    sizes: Any,
    image: Any,
    offset: Any,
    mask: Any,
    packed: Any,
    bias: Any,
    out: Any,
    c0: int,
    cw: int,
    o0: int,
    og: int,
    add: bool,
    tile: int,
    columns: Any,
    products: Any,
    begin: int,
    end: int,
) -> None:
    """Outputs of one block of channels, written or added to `out`; an item is `tile` output pixels.

    Parameters
    ----------
    sizes : tuple of int
        H, W, ow, kh, kw, sh, sw, dh, dw, pad_top, pad_left and the channels per deformable group.
    image : array [n, H*W + 1, width]
    offset : array [n, 2*D*K, oh*ow]
    mask : array [n, D*K, oh*ow], or of size 0 for none
    packed : array [Gb, panels, K*cw, lanes]
        From `pack_weight`.
    bias : array [O]
    out : array [n, O, oh*ow]
    c0, o0 : int
        First channel and first output of the block.
    columns : array [Gb, tile, K*cw]
        Scratch of this thread; tile is a multiple of ROWS.
    products : array [Gb, tile, panels*lanes]
        Scratch of this thread.
    """
    pixels = out.shape[2]
    Gb, panels, length, lanes = packed.shape
    for item in range(begin, end):
        first = item * tile
        last = min(first + tile, out.shape[0] * pixels)
        for q in range(first, last):
            _sample(sizes, image, offset, mask, columns, c0, cw, first, q)
        for g in range(Gb):
            for k in range(0, length, DEPTH):
                for panel in range(panels):
                    for row in range(0, last - first, ROWS):
                        _tile_product(
                            columns, (g * tile + row) * length + k, length, 1, last - first - row,
                            packed, ((g * panels + panel) * length + k) * lanes, lanes,
                            products, ((g * tile + row) * panels + panel) * lanes, panels * lanes,
                            min(DEPTH, length - k), k > 0,
                        )  # fmt: skip
            q = first
            while q < last:
                n = q // pixels
                p = q - n * pixels
                count = min(16, last - q, pixels - p)
                for o1 in range(0, og, 16):
                    for o in range(o1, min(o1 + 16, og)):
                        row = out[n, o0 + g * og + o, p : p + count]
                        if not add:
                            row[:] = bias[o0 + g * og + o]
                        for i in range(count):
                            row[i] += products[g, q - first + i, o]
                q += count


@kernel
def sample_columns(
    sizes: Any, image: Any, offset: Any, mask: Any, columns: Any, c0: int, cw: int, first: int, begin: int, end: int
) -> None:
    """``columns[:, q - first]`` of the output pixels ``first + begin <= q < first + end``: an item is a pixel."""
    for q in range(first + begin, first + end):
        _sample(sizes, image, offset, mask, columns, c0, cw, first, q)


@kernel
def column_gradients(
    grad_out: Any, packed: Any, gradients: Any, o0: int, first: int, last: int, tile: int, begin: int, end: int
) -> None:
    """Gradients of the columns of output pixels ``first <= q < last``; an item is `tile` of them.

    Parameters
    ----------
    grad_out : array [n*oh*ow, O]
        Channels-last.
    packed : array [Gb, panels, og, lanes]
        From `pack_weight_transposed`.
    gradients : array [Gb, >= last - first rounded up to ROWS, panels*lanes]
    """
    O = grad_out.shape[1]
    Gb, panels, og, lanes = packed.shape
    rows = gradients.shape[1]
    for item in range(begin, end):
        low = item * tile
        high = min(low + tile, last - first)
        for g in range(Gb):
            for o in range(0, og, DEPTH):
                for panel in range(panels):
                    for row in range(low, high, ROWS):
                        _tile_product(
                            grad_out, (first + row) * O + o0 + g * og + o, O, 1, high - row,
                            packed, ((g * panels + panel) * og + o) * lanes, lanes,
                            gradients, ((g * rows + row) * panels + panel) * lanes, panels * lanes,
                            min(DEPTH, og - o), o > 0,
                        )  # fmt: skip


@kernel
def weight_gradient(
    grad_out: Any,
    columns: Any,
    gradient: Any,
    o0: int,
    og: int,
    first: int,
    last: int,
    panel_rows: Any,
    begin: int,
    end: int,
) -> None:
    """Add the share of output pixels ``first <= q < last`` to the weight gradient; an item is one g and panel.

    Parameters
    ----------
    grad_out : array [n, O, oh*ow]
    columns : array [Gb, >= last - first, panels*lanes]
    gradient : array [Gb, og rounded up to ROWS, panels*lanes]
    panel_rows : array [DEPTH, lanes]
        Scratch of this thread.
    """
    O, pixels = grad_out.shape[1:]
    padded = columns.shape[2]
    depth, lanes = panel_rows.shape
    rows = gradient.shape[1]
    panels = padded // lanes
    q = first
    while q < last:
        n = q // pixels
        p = q - n * pixels
        count = min(depth, last - q, pixels - p)
        for item in range(begin, end):
            g = item // panels
            panel = item - g * panels
            # Rows of `columns` lie a fixed stride apart and would fall into few sets of the first-level cache.
            for row in range(count):
                for lane in range(lanes):
                    panel_rows[row, lane] = columns[g, q - first + row, panel * lanes + lane]
            for o in range(0, og, ROWS):
                _tile_product(
                    grad_out, (n * O + o0 + g * og + o) * pixels + p, pixels, 1, og - o,
                    panel_rows, 0, lanes,
                    gradient, (g * rows + o) * padded + panel * lanes, padded,
                    count, True,
                )  # fmt: skip
        q += count


@inner("reassoc", "nsz")
def _dot(a: Any, b: Any) -> Any:
    total = a.dtype.type(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@inner()
def _term(factor: Any, value: Any) -> Any:
    """A product in which a zero factor wins over infinity and NaN."""
    return factor * value if factor != 0 else type(factor)(0)


@kernel
def sampling_gradients(
    sizes: Any,
    image: Any,
    offset: Any,
    mask: Any,
    gradients: Any,
    grad_offset: Any,
    grad_mask: Any,
    c0: int,
    cw: int,
    first: int,
    begin: int,
    end: int,
) -> None:
    """Add one block's share of the offset and mask gradients of output pixels from `first` on; an item is a pixel.

    Parameters
    ----------
    gradients : array [Gb, >= end - begin, >= K*cw]
        From `column_gradients`.
    grad_offset : array [n, 2*D*K, oh*ow]
    grad_mask : array [n, D*K, oh*ow], or of size 0 for none
    """
    ow, kh, kw = sizes[2:5]
    K = kh * kw
    cd = sizes[11]
    real = image.dtype.type
    width = image.shape[2]
    zero = image.shape[1] - 1
    for q in range(first + begin, first + end):
        n = q // offset.shape[2]
        p = q - n * offset.shape[2]
        a = p // ow
        b = p - a * ow
        for d in range(c0 // cd, (c0 + width - 1) // cd + 1):
            low_channel = max(0, d * cd - c0)
            high_channel = min(width, (d + 1) * cd - c0)
            first_g = low_channel // cw
            last_g = (high_channel - 1) // cw
            for i in range(kh):
                for j in range(kw):
                    k = i * kw + j
                    inside, nan, y, x, ly, lx = _locate(sizes, offset, d, i, j, n, p, a, b)
                    if nan:
                        grad_offset[n, 2 * (d * K + k), p] = real(math.nan)
                        grad_offset[n, 2 * (d * K + k) + 1, p] = real(math.nan)
                        if grad_mask.size:
                            grad_mask[n, d * K + k, p] = real(math.nan)
                    if not inside:
                        continue
                    i00, i01, i10, i11 = _corners(sizes, y, x)
                    s00 = s01 = s10 = s11 = real(0)
                    for g in range(first_g, last_g + 1):
                        low = max(low_channel, g * cw)
                        high = min(high_channel, (g + 1) * cw)
                        row = gradients[g, q - first, k * cw + low - g * cw : k * cw + high - g * cw]
                        if i00 != zero:
                            s00 += _dot(row, image[n, i00, low:high])
                        if i01 != zero:
                            s01 += _dot(row, image[n, i01, low:high])
                        if i10 != zero:
                            s10 += _dot(row, image[n, i10, low:high])
                        if i11 != zero:
                            s11 += _dot(row, image[n, i11, low:high])
                    hy = real(1) - ly
                    hx = real(1) - lx
                    modulation = mask[n, d * K + k, p] if mask.size else real(1)
                    dy = _term(hx, s10 - s00) + _term(lx, s11 - s01)
                    dx = _term(hy, s01 - s00) + _term(ly, s11 - s10)
                    grad_offset[n, 2 * (d * K + k), p] += _term(modulation, dy)
                    grad_offset[n, 2 * (d * K + k) + 1, p] += _term(modulation, dx)
                    if grad_mask.size:
                        grad_mask[n, d * K + k, p] += (
                            _term(hy * hx, s00) + _term(hy * lx, s01) + _term(ly * hx, s10) + _term(ly * lx, s11)
                        )


@inner()
def _add_scaled(target: Any, scale: Any, row: Any) -> None:
    for c in range(row.shape[0]):
        target[c] += scale * row[c]


@kernel
def scatter_columns(
    sizes: Any,
    offset: Any,
    mask: Any,
    gradients: Any,
    grad_image: Any,
    c0: int,
    cw: int,
    first: int,
    last: int,
    begin: int,
    end: int,
) -> None:
    """Add the columns' gradients of output pixels ``first <= q < last`` to the image's.

    An item is a channel of the block: no two threads write one element, and each element is summed in the order of q.

    Parameters
    ----------
    gradients : array [Gb, >= last - first, >= K*cw]
        From `column_gradients`.
    grad_image : array [n, H*W + 1, width]
        Its last pixel stays zero.
    """
    ow, kh, kw = sizes[2:5]
    cd = sizes[11]
    zero = grad_image.shape[1] - 1
    for q in range(first, last):
        n = q // offset.shape[2]
        p = q - n * offset.shape[2]
        a = p // ow
        b = p - a * ow
        for d in range((c0 + begin) // cd, (c0 + end - 1) // cd + 1):
            low_channel = max(begin, d * cd - c0)
            high_channel = min(end, (d + 1) * cd - c0)
            first_g = low_channel // cw
            last_g = (high_channel - 1) // cw
            for i in range(kh):
                for j in range(kw):
                    k = i * kw + j
                    inside, _, y, x, ly, lx = _locate(sizes, offset, d, i, j, n, p, a, b)
                    if not inside:
                        continue
                    i00, i01, i10, i11, w00, w01, w10, w11 = _weighted_corners(sizes, mask, d, k, n, p, y, x, ly, lx)
                    for g in range(first_g, last_g + 1):
                        low = max(low_channel, g * cw)
                        high = min(high_channel, (g + 1) * cw)
                        row = gradients[g, q - first, k * cw + low - g * cw : k * cw + high - g * cw]
                        if i00 != zero:
                            _add_scaled(grad_image[n, i00, low:high], w00, row)
                        if i01 != zero:
                            _add_scaled(grad_image[n, i01, low:high], w01, row)
                        if i10 != zero:
                            _add_scaled(grad_image[n, i10, low:high], w10, row)
                        if i11 != zero:
                            _add_scaled(grad_image[n, i11, low:high], w11, row)
