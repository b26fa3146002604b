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
gradients : array [Gb, >= last - first, panels*lanes >= K*cw]
    Gradients of the im2col columns of output pixels from `first` on, written by `column_gradients`.
c0, o0 : int
    First input and output channel of the block.
g0, cw, og : int
    First weight group of the block, its channels per weight group, and the output channels per weight group.
samples : tuple of array
    Scratch memory of the thread for the sampling points of a strip; see `_locate_samples`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from dcnops._backends.cpu.compiled import INTERPRETED, inner, kernel

ROWS = 6
"""Rows of the register tile. With two vectors per row, its 12 sums fit the 16 AVX registers and hide the latency."""

STRIP = 32
"""Maximum length of a strip: output pixels of one row that are located together."""

DEPTH = 192
"""Depth of one product of a register tile; this part of a panel stays in the first-level cache."""

_VECTORS = 2
_CPU = llvmlite.binding.get_host_cpu_features()
_VECTOR_BYTES = 64 if _CPU.get("avx512f") else 32 if _CPU.get("avx") else 16


def panel_lanes(itemsize: int) -> int:
    """Return the width of the register tile, to which packed matrices are padded."""
    return _VECTORS * _VECTOR_BYTES // itemsize


@intrinsic  # type: ignore[untyped-decorator]
def _tile_product(
    typing_context: Any, a: Any, a_start: Any, a_row: Any, a_depth: Any, a_rows: Any, b: Any, b_start: Any,
    b_depth: Any, c: Any, c_start: Any, c_row: Any, depth: Any, accumulate: Any,
) -> Any:  # fmt: skip
    """Compute ``c[r, l] (+)= sum_k a[r, k] * b[k, l]`` for ROWS rows and one panel of lanes, with `depth` >= 1.

    The sums stay in registers, which LLVM does not achieve for a loop written in Python. `*_start`, `*_row` and
    `*_depth` count elements; rows of b and c have unit stride. Only the first `a_rows` rows of a are read; the products
    of the other rows are undefined.
    """
    integer = types.intp
    signature = types.void(
        a, integer, integer, integer, integer, b, integer, integer, c, integer, integer, integer, types.boolean
    )  # fmt: skip

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, a_start, a_row, a_depth, a_rows, b, b_start, b_depth, c, c_start, c_row, depth, accumulate = args
        scalar = context.get_value_type(signature.args[0].dtype)
        itemsize = context.get_abi_sizeof(scalar)
        vector = ir.VectorType(scalar, _VECTOR_BYTES // itemsize)
        index = context.get_value_type(integer)

        def start(array: Any, array_type: Any, offset: Any) -> Any:
            return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])

        def vector_at(pointer: Any, offset: Any, number: int) -> Any:
            address = builder.gep(pointer, [builder.add(offset, index(number * vector.count))])
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

        def products(k: Any) -> list[Any]:
            b_vectors = [
                builder.load(vector_at(pointer_b, builder.mul(k, b_depth), number), align=itemsize)
                for number in range(_VECTORS)
            ]
            a_offset = builder.mul(k, a_depth)
            results = []
            for row in range(ROWS):
                value = builder.load(builder.gep(pointer_a, [builder.add(a_offsets[row], a_offset)]))
                factors = _broadcast(builder, value, vector)
                results += [builder.fmul(factors, b_vector, flags=("contract",)) for b_vector in b_vectors]
            return results

        _generate_sums(builder, products, targets, itemsize, depth, accumulate)
        return context.get_dummy_value()

    return signature, generate


def _broadcast(builder: Any, value: Any, vector: Any) -> Any:
    """Generate a vector of equal elements."""
    undefined = ir.Constant(vector, ir.Undefined)
    first_lane = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(builder.insert_element(undefined, value, ir.IntType(32)(0)), undefined, first_lane)


def _generate_sums(
    builder: Any, products: Callable[[Any], list[Any]], targets: list[Any], itemsize: int, depth: Any, accumulate: Any
) -> None:
    """Generate the loop ``targets (+)= sum_k products(k)`` over ``0 <= k < depth``, with the sums in registers."""
    index = depth.type
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
    sums = [builder.phi(old.type) for old in loaded]
    new_sums = [builder.fadd(old, product, flags=("contract",)) for old, product in zip(sums, products(k))]
    next_k = builder.add(k, index(1))
    builder.cbranch(builder.icmp_signed("<", next_k, depth), loop, done)
    for block, value in ((before, index(0)), (load, index(0)), (loop, next_k)):
        k.add_incoming(value, block)
    for total, old, new in zip(sums, loaded, new_sums):
        total.add_incoming(ir.Constant(old.type, [0.0] * old.type.count), before)
        total.add_incoming(old, load)
        total.add_incoming(new, loop)

    builder.position_at_end(done)
    for target, new in zip(targets, new_sums):
        builder.store(new, target, align=itemsize)


def _interpreted_tile_product(
    a: Any, a_start: int, a_row: int, a_depth: int, a_rows: int, b: Any, b_start: int, b_depth: int, c: Any,
    c_start: int, c_row: int, depth: int, accumulate: bool,
) -> None:  # fmt: skip
    """Compute `_tile_product` without the compiler."""
    lanes = panel_lanes(a.itemsize)
    a, b, c = a.reshape(-1), b.reshape(-1), c.reshape(-1)
    for row in range(ROWS):
        target = c[c_start + row * c_row :][:lanes]
        if not accumulate:
            target[:] = 0
        for k in range(depth if row < a_rows else 0):
            target += a[a_start + row * a_row + k * a_depth] * b[b_start + k * b_depth :][:lanes]


if INTERPRETED:
    _tile_product = _interpreted_tile_product


@kernel
def pack_weight(weight: Any, packed: Any, g0: int, c0: int, cw: int, og: int, begin: int, end: int) -> None:
    """Set ``packed[g, panel, k*cw + c, lane] = weight[(g0+g)*og + o, c0 + c, k]`` with o = panel*lanes + lane.

    A work item is one g and panel. `packed` [Gb, panels, K*cw, lanes] is 0 in the lanes beyond the last o.
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
    """Set ``packed[g, panel, o, lane] = weight[(g0+g)*og + o, c0 + c, k]`` with k*cw + c = panel*lanes + lane.

    A work item is one g and o. `packed` [Gb, panels, og, lanes] is 0 in the lanes beyond the last (k, c).
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
    """Set ``weight[(g0+g)*og + o, c0 + c, k] = gradient[g, o, k*cw + c]``; a work item is one g and o."""
    K = weight.shape[2]
    for item in range(begin, end):
        g = item // og
        o = item % og
        for c in range(cw):
            for k in range(K):
                weight[(g0 + g) * og + o, c0 + c, k] = gradient[g, o, k * cw + c]


@inner()
def _strip_length(sizes: Any, p: int, last: int) -> Any:
    """Return the length of the strip of output pixels that starts at p and ends before `last`."""
    return min(STRIP, last - p, sizes[2] - p % sizes[2])


@inner()
def _corner_weight(valid: bool, bilinear: Any, modulation: Any) -> Any:
    """Return the weight of a corner, which is 0 for any mask if the corner must not contribute."""
    return bilinear * modulation if valid & (bilinear != 0) else type(bilinear)(0)


@inner()
def _locate_samples(
    sizes: Any, offset: Any, mask: Any, samples: Any, k0: int, k1: int, d: int, n: int, p: int, count: int
) -> None:
    """Locate the sampling points of the taps ``k0 <= k < k1`` of group d for a strip of output pixels.

    Without vectorisation this would take as long as the loops over channels. The compiler vectorises the loop over
    pixels only if the stores into one array are constant distances apart.

    Parameters
    ----------
    samples : tuple of array
        corners [K, 4*STRIP] int32: pixels (y, x), (y, x+1), (y+1, x), (y+1, x+1) of the image; the zero pixel for
        corners outside the image and samples outside the open box.
        weights [K, 7*STRIP]: the four corner weights (bilinear times mask), ly, lx, and the mask, which is 1 outside
        the open box. A NaN coordinate makes the first six NaN.
    """
    H, W, ow, kh, kw, sh, sw, dh, dw, pad_top, pad_left, _ = sizes
    corners, weights = samples
    real = offset.dtype.type
    one = real(1)
    zero = H * W
    a = p // ow
    b = p - a * ow
    for k in range(k0, k1):
        i = k // kw
        j = k - i * kw
        channel = 2 * (d * kh * kw + k)
        ys = offset[n, channel, p : p + count]
        xs = offset[n, channel + 1, p : p + count]
        ms = mask[n, channel // 2, p : p + count] if mask.size else ys
        base_y = real(a * sh - pad_top + i * dh)
        base_x = b * sw - pad_left + j * dw
        for t in range(count):
            py = base_y + ys[t]
            px = real(base_x + t * sw) + xs[t]
            inside = (py > -one) & (py < real(H)) & (px > -one) & (px < real(W))
            nan = (py != py) | (px != px)
            fy = np.floor(py) if inside else real(0)
            fx = np.floor(px) if inside else real(0)
            lost = real(math.nan) if nan else real(0)
            ly = py - fy if inside else lost
            lx = px - fx if inside else lost
            hy = one - ly
            hx = one - lx
            y = np.int32(fy)
            x = np.int32(fx)
            top = inside & (y >= 0)
            bottom = inside & (y < H - 1)
            left = x >= 0
            right = x < W - 1
            pixel = y * W + x
            corners[k, t] = pixel if top & left else zero
            corners[k, STRIP + t] = pixel + 1 if top & right else zero
            corners[k, 2 * STRIP + t] = pixel + W if bottom & left else zero
            corners[k, 3 * STRIP + t] = pixel + W + 1 if bottom & right else zero
            modulation = ms[t] if inside & (mask.size > 0) else one
            weights[k, t] = _corner_weight((top & left) | nan, hy * hx, modulation)
            weights[k, STRIP + t] = _corner_weight((top & right) | nan, hy * lx, modulation)
            weights[k, 2 * STRIP + t] = _corner_weight((bottom & left) | nan, ly * hx, modulation)
            weights[k, 3 * STRIP + t] = _corner_weight((bottom & right) | nan, ly * lx, modulation)
            weights[k, 4 * STRIP + t] = ly
            weights[k, 5 * STRIP + t] = lx
            weights[k, 6 * STRIP + t] = modulation


@inner()
def _fill_columns(
    sizes: Any, image: Any, offset: Any, mask: Any, samples: Any, columns: Any, row: int, c0: int, cw: int, n: int,
    p: int, count: int, g0: int, g1: int, first: int, last: int,
) -> None:  # fmt: skip
    """Fill ``columns[g - g0, row + t, column - first]`` of a strip for ``g0 <= g < g1``, ``first <= column < last``."""
    corners, weights = samples
    cd = sizes[11]
    zero = image.shape[1] - 1
    k0 = first // cw
    k1 = (last - 1) // cw + 1
    for d in range((c0 + g0 * cw) // cd, (c0 + g1 * cw - 1) // cd + 1):
        _locate_samples(sizes, offset, mask, samples, k0, k1, d, n, p, count)
        begin = max(g0 * cw, d * cd - c0)
        end = min(g1 * cw, (d + 1) * cd - c0)
        for t in range(count):
            for k in range(k0, k1):
                w00 = weights[k, t]
                w01 = weights[k, STRIP + t]
                w10 = weights[k, 2 * STRIP + t]
                w11 = weights[k, 3 * STRIP + t]
                # Corners without weight are not read, so that infinity and NaN there have no effect.
                i00 = corners[k, t] if w00 != 0 else zero
                i01 = corners[k, STRIP + t] if w01 != 0 else zero
                i10 = corners[k, 2 * STRIP + t] if w10 != 0 else zero
                i11 = corners[k, 3 * STRIP + t] if w11 != 0 else zero
                for g in range(begin // cw, (end - 1) // cw + 1):
                    shift = (k - g) * cw
                    low = max(begin, g * cw, first - shift)
                    high = min(end, (g + 1) * cw, last - shift)
                    if low < high:
                        x00 = image[n, i00, low:high]
                        x01 = image[n, i01, low:high]
                        x10 = image[n, i10, low:high]
                        x11 = image[n, i11, low:high]
                        target = columns[g - g0, row + t, low + shift - first : high + shift - first]
                        for c in range(high - low):
                            target[c] = w00 * x00[c] + w01 * x01[c] + w10 * x10[c] + w11 * x11[c]


@kernel
def output_tile(
    sizes: Any, image: Any, offset: Any, mask: Any, packed: Any, bias: Any, out: Any, c0: int, cw: int, o0: int,
    og: int, add: bool, tile: int, samples: Any, columns: Any, products: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Write the output of one block of channels to `out`, or add it; a work item is `tile` output pixels.

    Parameters
    ----------
    packed : array [Gb, panels, K*cw, lanes]
        From `pack_weight`.
    bias : array [O]
    out : array [n, O, oh*ow]
    tile : int
        A multiple of ROWS.
    columns : array [Gb, tile, K*cw], products : array [Gb, tile, panels*lanes]
        Scratch memory of the thread.
    """
    pixels = out.shape[2]
    Gb, panels, length, lanes = packed.shape
    for item in range(begin, end):
        first = item * tile
        last = min(first + tile, out.shape[0] * pixels)
        q = first
        while q < last:
            n = q // pixels
            p = q - n * pixels
            count = _strip_length(sizes, p, p + last - q)
            _fill_columns(
                sizes, image, offset, mask, samples, columns, q - first, c0, cw, n, p, count, 0, Gb, 0, length
            )
            q += count
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
def column_gradients(
    grad_out: Any, packed: Any, gradients: Any, o0: int, first: int, last: int, tile: int, begin: int, end: int
) -> None:
    """Compute the column gradients of the output pixels ``first <= q < last``; a work item is `tile` pixels.

    Parameters
    ----------
    grad_out : array [n*oh*ow, O]
        Channels-last.
    packed : array [Gb, panels, og, lanes]
        From `pack_weight_transposed`.
    gradients : array
        Has rows for `last - first` rounded up to ROWS.
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
    sizes: Any, image: Any, offset: Any, mask: Any, grad_out: Any, gradient: Any, c0: int, cw: int, o0: int, og: int,
    samples: Any, columns: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Add to the weight gradient of one block for a chunk of images; a work item is one g and some panels.

    Each thread samples the columns that it multiplies, so that they stay in its cache.

    Parameters
    ----------
    grad_out : array [n, O, oh*ow]
    gradient : array [Gb, og rounded up to ROWS, panels*lanes]
    columns : array [1, DEPTH, panels of an item * lanes]
        Scratch memory of the thread.
    """
    images, O, pixels = grad_out.shape
    _, rows, padded = gradient.shape
    _, depth, wide = columns.shape
    K = samples[0].shape[0]
    lanes = _VECTORS * _VECTOR_BYTES // image.itemsize
    pieces = (padded + wide - 1) // wide
    for item in range(begin, end):
        g = item // pieces
        first_column = (item - g * pieces) * wide
        last_column = min(first_column + wide, K * cw)
        for n in range(images):
            for p0 in range(0, pixels, depth):
                number = min(depth, pixels - p0)
                p = p0
                while p < p0 + number:
                    count = _strip_length(sizes, p, p0 + number)
                    _fill_columns(
                        sizes, image, offset, mask, samples, columns, p - p0, c0, cw, n, p, count,
                        g, g + 1, first_column, last_column,
                    )  # fmt: skip
                    p += count
                for column in range(first_column, last_column, lanes):
                    for o in range(0, og, ROWS):
                        _tile_product(
                            grad_out, (n * O + o0 + g * og + o) * pixels + p0, pixels, 1, og - o,
                            columns, column - first_column, wide,
                            gradient, (g * rows + o) * padded + column, padded,
                            number, True,
                        )  # fmt: skip


@inner("reassoc", "nsz")
def _corner_dots(a: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> Any:
    s0 = s1 = s2 = s3 = a.dtype.type(0)
    for i in range(a.shape[0]):
        s0 += a[i] * b0[i]
        s1 += a[i] * b1[i]
        s2 += a[i] * b2[i]
        s3 += a[i] * b3[i]
    return s0, s1, s2, s3


@inner()
def _masked_product(factor: Any, value: Any) -> Any:
    """Return a product that is 0 if the factor is 0, even for an infinite or NaN value."""
    return factor * value if factor != 0 else type(factor)(0)


@inner()
def _add_sampling_gradients(
    sizes: Any, image: Any, samples: Any, gradients: Any, row: int, grad_offset: Any, grad_mask: Any, c0: int,
    cw: int, d: int, n: int, p: int, t: int,
) -> None:  # fmt: skip
    """Add the offset and mask gradients of group d for output pixel (n, p), which is pixel t of the strip."""
    corners, weights = samples
    K = corners.shape[0]
    cd = sizes[11]
    real = image.dtype.type
    zero = image.shape[1] - 1
    begin = max(0, d * cd - c0)
    end = min(image.shape[2], (d + 1) * cd - c0)
    for k in range(K):
        i00 = corners[k, t]
        i01 = corners[k, STRIP + t]
        i10 = corners[k, 2 * STRIP + t]
        i11 = corners[k, 3 * STRIP + t]
        s00 = s01 = s10 = s11 = real(0)
        for g in range(begin // cw, (end - 1) // cw + 1):
            low = max(begin, g * cw)
            high = min(end, (g + 1) * cw)
            r00, r01, r10, r11 = _corner_dots(
                gradients[g, row, k * cw + low - g * cw : k * cw + high - g * cw],
                image[n, i00, low:high],
                image[n, i01, low:high],
                image[n, i10, low:high],
                image[n, i11, low:high],
            )
            # The product of an infinite gradient and the zero pixel must not be NaN.
            s00 += r00 if i00 != zero else real(0)
            s01 += r01 if i01 != zero else real(0)
            s10 += r10 if i10 != zero else real(0)
            s11 += r11 if i11 != zero else real(0)
        ly = weights[k, 4 * STRIP + t]
        lx = weights[k, 5 * STRIP + t]
        modulation = weights[k, 6 * STRIP + t]
        hy = real(1) - ly
        hx = real(1) - lx
        dy = _masked_product(hx, s10 - s00) + _masked_product(lx, s11 - s01)
        dx = _masked_product(hy, s01 - s00) + _masked_product(ly, s11 - s10)
        grad_offset[n, 2 * (d * K + k), p] += _masked_product(modulation, dy)
        grad_offset[n, 2 * (d * K + k) + 1, p] += _masked_product(modulation, dx)
        if grad_mask.size:
            top = _masked_product(hy * hx, s00) + _masked_product(hy * lx, s01)
            grad_mask[n, d * K + k, p] += top + _masked_product(ly * hx, s10) + _masked_product(ly * lx, s11)


@kernel
def sampling_gradients(
    sizes: Any, image: Any, offset: Any, mask: Any, gradients: Any, grad_offset: Any, grad_mask: Any, c0: int,
    cw: int, first: int, samples: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Add the offset and mask gradients of one block for output pixels from `first` on; a work item is a pixel.

    `grad_offset` and `grad_mask` have the shapes of `offset` and `mask`; `grad_mask` may be empty.
    """
    pixels = offset.shape[2]
    cd = sizes[11]
    q = first + begin
    while q < first + end:
        n = q // pixels
        p = q - n * pixels
        count = _strip_length(sizes, p, p + first + end - q)
        for d in range(c0 // cd, (c0 + image.shape[2] - 1) // cd + 1):
            _locate_samples(sizes, offset, mask, samples, 0, samples[0].shape[0], d, n, p, count)
            for t in range(count):
                _add_sampling_gradients(
                    sizes, image, samples, gradients, q - first + t, grad_offset, grad_mask, c0, cw, d, n, p + t, t
                )  # fmt: skip
        q += count


@inner()
def _add_scaled(target: Any, scale: Any, row: Any) -> None:
    for c in range(row.shape[0]):
        target[c] += scale * row[c]


@kernel
def scatter_columns(
    sizes: Any, offset: Any, mask: Any, gradients: Any, grad_image: Any, c0: int, cw: int, first: int, last: int,
    samples: Any, begin: int, end: int,
) -> None:  # fmt: skip
    """Scatter the column gradients of the output pixels ``first <= q < last`` to the image gradient.

    A work item is a channel of the block, so that no two threads write the same element. The terms of each element are
    added in the order of q. `grad_image` has the shape of `image`; its last pixel is undefined.
    """
    corners, weights = samples
    pixels = offset.shape[2]
    cd = sizes[11]
    q = first
    while q < last:
        n = q // pixels
        p = q - n * pixels
        count = _strip_length(sizes, p, p + last - q)
        for d in range((c0 + begin) // cd, (c0 + end - 1) // cd + 1):
            low_channel = max(begin, d * cd - c0)
            high_channel = min(end, (d + 1) * cd - c0)
            _locate_samples(sizes, offset, mask, samples, 0, samples[0].shape[0], d, n, p, count)
            for t in range(count):
                for k in range(corners.shape[0]):
                    for g in range(low_channel // cw, (high_channel - 1) // cw + 1):
                        low = max(low_channel, g * cw)
                        high = min(high_channel, (g + 1) * cw)
                        row = gradients[g, q - first + t, k * cw + low - g * cw : k * cw + high - g * cw]
                        for corner in range(t, 4 * STRIP, STRIP):
                            if weights[k, corner] != 0:
                                _add_scaled(grad_image[n, corners[k, corner], low:high], weights[k, corner], row)
        q += count
