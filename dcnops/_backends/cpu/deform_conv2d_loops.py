"""The compiled loops of deformable convolution on the CPU.

Every kernel works on the items ``begin <= item < end`` of its work, releases the GIL and writes nothing that another
item of the same kernel writes: any split over threads gives the same bits. Arrays must be C-contiguous, aligned and
writable (one compiled variant per dtype), float32 or float64, and of one dtype within a call.

Layouts used by all kernels. A block is a range of ``width = Gb*cw`` channels: `Gb` whole weight groups, or `cw`
channels of one group. ``image [n, H*W + 1, width]`` is channels-last, the extra pixel at its end is zero: corners
that must not take part point there, which keeps the inner loops free of branches. Output pixels of a chunk of images
have one running index q. A matrix product sees columns or their gradients as ``[Gb, q, K*cw or more]``.
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

ROWS = 6
"""Rows of the register tile: with two vectors a row, its 12 sums fit the 16 registers of AVX and hide the latency."""

STRIP = 32
"""Output pixels whose sampling is planned at once; they lie in one row."""

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
def _strip(sizes: Any, p: int, last: int) -> Any:
    """How many output pixels from p on, all before `last`, are one strip."""
    return min(STRIP, last - p, sizes[2] - p % sizes[2])


@inner()
def _weight(valid: bool, bilinear: Any, modulation: Any) -> Any:
    """Weight of a corner: exactly 0, whatever the mask is, for one that must not take part."""
    return bilinear * modulation if valid & (bilinear != 0) else type(bilinear)(0)


@inner()
def _plan(sizes: Any, offset: Any, mask: Any, plan: Any, k0: int, k1: int, d: int, n: int, p: int, count: int) -> None:
    """Plan where taps ``k0 <= k < k1`` of group d sample for a strip of output pixels.

    One pixel at a time, this would take as long as the loops over channels do: the loop over pixels must vectorise.
    The compiler sees that only if the stores into one array are constant distances apart.

    Parameters
    ----------
    plan : tuple of array
        corners [K, 4*STRIP] int32: pixels (y, x), (y, x+1), (y+1, x), (y+1, x+1) of the image; the zero pixel for
        those outside of it and for samples outside of the open box.
        weights [K, 7*STRIP]: the weights of the corners, bilinear times mask; ly, lx and the mask, which is 1 outside
        of the open box. NaN coordinates make the first six NaN.
    """
    H, W, ow, kh, kw, sh, sw, dh, dw, pad_top, pad_left, _ = sizes
    corners, weights = plan
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
            weights[k, t] = _weight((top & left) | nan, hy * hx, modulation)
            weights[k, STRIP + t] = _weight((top & right) | nan, hy * lx, modulation)
            weights[k, 2 * STRIP + t] = _weight((bottom & left) | nan, ly * hx, modulation)
            weights[k, 3 * STRIP + t] = _weight((bottom & right) | nan, ly * lx, modulation)
            weights[k, 4 * STRIP + t] = ly
            weights[k, 5 * STRIP + t] = lx
            weights[k, 6 * STRIP + t] = modulation


@inner()
def _sample(
    sizes: Any,
    image: Any,
    offset: Any,
    mask: Any,
    plan: Any,
    columns: Any,
    row: int,
    c0: int,
    cw: int,
    n: int,
    p: int,
    count: int,
    g0: int,
    g1: int,
    first: int,
    last: int,
) -> None:
    """``columns[g - g0, row + t, column - first]`` of a strip, for ``g0 <= g < g1`` and ``first <= column < last``."""
    corners, weights = plan
    cd = sizes[11]
    zero = image.shape[1] - 1
    k0 = first // cw
    k1 = (last - 1) // cw + 1
    for d in range((c0 + g0 * cw) // cd, (c0 + g1 * cw - 1) // cd + 1):
        _plan(sizes, offset, mask, plan, k0, k1, d, n, p, count)
        begin = max(g0 * cw, d * cd - c0)
        end = min(g1 * cw, (d + 1) * cd - c0)
        for t in range(count):
            for k in range(k0, k1):
                w00 = weights[k, t]
                w01 = weights[k, STRIP + t]
                w10 = weights[k, 2 * STRIP + t]
                w11 = weights[k, 3 * STRIP + t]
                # What has no weight is not read: infinity and NaN there have no effect.
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
    plan: Any,
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
    plan : tuple of array
        Scratch of this thread, see `_plan`; so are `columns` and `products`.
    columns : array [Gb, tile, K*cw]
        The tile is a multiple of ROWS.
    products : array [Gb, tile, panels*lanes]
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
            count = _strip(sizes, p, p + last - q)
            _sample(sizes, image, offset, mask, plan, columns, q - first, c0, cw, n, p, count, 0, Gb, 0, length)
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
    sizes: Any,
    image: Any,
    offset: Any,
    mask: Any,
    grad_out: Any,
    gradient: Any,
    c0: int,
    cw: int,
    o0: int,
    og: int,
    plan: Any,
    columns: Any,
    begin: int,
    end: int,
) -> None:
    """Add the share of some images to the weight gradient of one block; an item is one g and some panels.

    Each thread samples the columns that it multiplies: they stay in its cache.

    Parameters
    ----------
    grad_out : array [n, O, oh*ow]
    gradient : array [Gb, og rounded up to ROWS, panels*lanes]
    plan : tuple of array
        Scratch of this thread, see `_plan`.
    columns : array [1, DEPTH, panels of an item * lanes]
        Scratch of this thread.
    """
    images, O, pixels = grad_out.shape
    _, rows, padded = gradient.shape
    _, depth, wide = columns.shape
    K = plan[0].shape[0]
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
                    count = _strip(sizes, p, p0 + number)
                    _sample(
                        sizes, image, offset, mask, plan, columns, p - p0, c0, cw, n, p, count,
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
def _dots(a: Any, b0: Any, b1: Any, b2: Any, b3: Any) -> Any:
    s0 = s1 = s2 = s3 = a.dtype.type(0)
    for i in range(a.shape[0]):
        s0 += a[i] * b0[i]
        s1 += a[i] * b1[i]
        s2 += a[i] * b2[i]
        s3 += a[i] * b3[i]
    return s0, s1, s2, s3


@inner()
def _term(factor: Any, value: Any) -> Any:
    """A product in which a zero factor wins over infinity and NaN."""
    return factor * value if factor != 0 else type(factor)(0)


@inner()
def _differentiate(
    sizes: Any,
    image: Any,
    plan: Any,
    gradients: Any,
    row: int,
    grad_offset: Any,
    grad_mask: Any,
    c0: int,
    cw: int,
    d: int,
    n: int,
    p: int,
    t: int,
) -> None:
    """Add the offset and mask gradients of group d from ``gradients[:, row]`` and pixel t, (n, p), of the plan."""
    corners, weights = plan
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
            r00, r01, r10, r11 = _dots(
                gradients[g, row, k * cw + low - g * cw : k * cw + high - g * cw],
                image[n, i00, low:high],
                image[n, i01, low:high],
                image[n, i10, low:high],
                image[n, i11, low:high],
            )
            # An infinite gradient times the zero pixel is no NaN.
            s00 += r00 if i00 != zero else real(0)
            s01 += r01 if i01 != zero else real(0)
            s10 += r10 if i10 != zero else real(0)
            s11 += r11 if i11 != zero else real(0)
        ly = weights[k, 4 * STRIP + t]
        lx = weights[k, 5 * STRIP + t]
        modulation = weights[k, 6 * STRIP + t]
        hy = real(1) - ly
        hx = real(1) - lx
        dy = _term(hx, s10 - s00) + _term(lx, s11 - s01)
        dx = _term(hy, s01 - s00) + _term(ly, s11 - s10)
        grad_offset[n, 2 * (d * K + k), p] += _term(modulation, dy)
        grad_offset[n, 2 * (d * K + k) + 1, p] += _term(modulation, dx)
        if grad_mask.size:
            grad_mask[n, d * K + k, p] += (
                _term(hy * hx, s00) + _term(hy * lx, s01) + _term(ly * hx, s10) + _term(ly * lx, s11)
            )


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
    plan: Any,
    begin: int,
    end: int,
) -> None:
    """Add one block's share of the offset and mask gradients of output pixels from `first` on; an item is a pixel.

    Parameters
    ----------
    gradients : array [Gb, >= end, >= K*cw]
        From `column_gradients`.
    grad_offset : array [n, 2*D*K, oh*ow]
    grad_mask : array [n, D*K, oh*ow], or of size 0 for none
    plan : tuple of array
        Scratch of this thread, see `_plan`.
    """
    pixels = offset.shape[2]
    cd = sizes[11]
    q = first + begin
    while q < first + end:
        n = q // pixels
        p = q - n * pixels
        count = _strip(sizes, p, p + first + end - q)
        for d in range(c0 // cd, (c0 + image.shape[2] - 1) // cd + 1):
            _plan(sizes, offset, mask, plan, 0, plan[0].shape[0], d, n, p, count)
            for t in range(count):
                _differentiate(
                    sizes, image, plan, gradients, q - first + t, grad_offset, grad_mask, c0, cw, d, n, p + t, t
                )  # fmt: skip
        q += count


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
    plan: Any,
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
        Its last pixel is undefined.
    plan : tuple of array
        Scratch of this thread, see `_plan`.
    """
    corners, weights = plan
    pixels = offset.shape[2]
    cd = sizes[11]
    q = first
    while q < last:
        n = q // pixels
        p = q - n * pixels
        count = _strip(sizes, p, p + last - q)
        for d in range((c0 + begin) // cd, (c0 + end - 1) // cd + 1):
            low_channel = max(begin, d * cd - c0)
            high_channel = min(end, (d + 1) * cd - c0)
            _plan(sizes, offset, mask, plan, 0, plan[0].shape[0], d, n, p, count)
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
