"""Inner loops, generated as vector code.

LLVM compiles such loops badly if they are written in Python: it keeps no register tile of sums, and it leaves rows of
few channels to scalar code. The functions take a row as an array and the position of the row's first element, because
slices take long to compile.

Numba does not recompile loops if this file changes: delete the `__pycache__` next to it after an edit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dcnops._backends.cpu.compiled import INTERPRETED

ROWS = 6
"""Rows of the register tile. With two vectors per row, its 12 sums fit the 16 AVX registers and hide the latency."""

STRIP = 32
"""Maximum length of a strip: output pixels of one row that are located together."""

DEPTH = 192
"""Depth of one product of a register tile; this part of a panel stays in the first-level cache."""

_VECTORS = 2
_CPU = llvmlite.binding.get_host_cpu_features()
VECTOR_BYTES = 64 if _CPU.get("avx512f") else 32 if _CPU.get("avx") else 16

PANEL_BYTES = _VECTORS * VECTOR_BYTES
"""Width of the register tile."""


def panel_lanes(itemsize: int) -> int:
    """Return the width of the register tile, to which packed matrices are padded."""
    return PANEL_BYTES // itemsize


@intrinsic  # type: ignore[untyped-decorator]
def tile_product(
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
        vector = ir.VectorType(scalar, VECTOR_BYTES // itemsize)
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
                factors = broadcast(builder, value, vector)
                results += [builder.fmul(factors, b_vector, flags=("contract",)) for b_vector in b_vectors]
            return results

        _generate_sums(builder, products, targets, itemsize, depth, accumulate)
        return context.get_dummy_value()

    return signature, generate


def broadcast(builder: Any, value: Any, vector: Any) -> Any:
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
    """Compute `tile_product` without the compiler."""
    lanes = panel_lanes(a.itemsize)
    a, b, c = a.reshape(-1), b.reshape(-1), c.reshape(-1)
    for row in range(ROWS):
        target = c[c_start + row * c_row :][:lanes]
        if not accumulate:
            target[:] = 0
        for k in range(depth if row < a_rows else 0):
            target += a[a_start + row * a_row + k * a_depth] * b[b_start + k * b_depth :][:lanes]


class _Elements:
    """Elements of a C-contiguous array from a position on, read and written as vectors of several widths."""

    def __init__(self, builder: Any, pointer: Any, itemsize: int) -> None:
        self._builder, self.pointer, self.itemsize = builder, pointer, itemsize
        self.scalar = pointer.type.pointee
        self.lanes = VECTOR_BYTES // itemsize

    @classmethod
    def of(cls, context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> _Elements:
        """Return the elements of a Numba array from `start` on."""
        pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [start])
        return cls(builder, pointer, context.get_abi_sizeof(pointer.type.pointee))

    def _vector_pointer(self, position: Any, width: int) -> Any:
        address = self._builder.gep(self.pointer, [position])
        return self._builder.bitcast(address, ir.VectorType(self.scalar, width).as_pointer())

    def element(self, position: Any) -> Any:
        return self._builder.load(self._builder.gep(self.pointer, [position]))

    def load(self, position: Any, width: int) -> Any:
        return self._builder.load(self._vector_pointer(position, width), align=self.itemsize)

    def store(self, vector: Any, position: Any) -> None:
        self._builder.store(vector, self._vector_pointer(position, vector.type.count), align=self.itemsize)


class _Strip:
    """Arguments of the three functions below, which work on one tap of a strip of sampling points."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any) -> None:
        def elements(number: int) -> _Elements:
            return _Elements.of(context, builder, signature.args[number], args[number], args[number + 1])

        self._builder = builder
        self.image, self._corners, self.weights, self.columns = map(elements, (0, 3, 5, 7))
        self._width, self._row, self.count, self.channels = args[2], args[9], args[10], args[11]

    def corner_starts(self, t: Any) -> list[Any]:
        """Return the positions of the four corners of sampling point t, counted from the start of `image`."""
        starts = []
        for number in range(4):
            pixel = self._corners.element(self._builder.add(t, t.type(number * STRIP)))
            starts.append(self._builder.mul(self._builder.sext(pixel, t.type), self._width))
        return starts

    def column_start(self, t: Any) -> Any:
        return self._builder.mul(t, self._row)

    @staticmethod
    def signature(*arrays: Any) -> Any:
        image, corners, weights, columns = arrays
        integer = types.intp
        return types.void(image, integer, integer, corners, integer, weights, integer, columns, *[integer] * 4)


def _for_pieces(builder: Any, count: Any, lanes: int, body: Callable[[Any, int], None]) -> None:
    """Generate ``body(position, width)`` for consecutive pieces of a row: full vectors, then the bits of the rest."""
    index = count.type
    full = builder.and_(count, index(-lanes))
    with cgutils.for_range_slice(builder, index(0), full, index(lanes), index) as (position, _):
        body(position, lanes)
    position, width = full, lanes // 2
    while width:
        present = builder.and_(count, index(width))
        with builder.if_then(builder.icmp_unsigned("!=", present, index(0))):
            body(position, width)
        position = builder.add(position, present)
        width //= 2


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.fadd(c, builder.fmul(a, b, flags=("contract",)), flags=("contract",))


@intrinsic  # type: ignore[untyped-decorator]
def blend_strip(
    typing_context: Any, image: Any, image_start: Any, width: Any, corners: Any, corner_start: Any, weights: Any,
    weight_start: Any, columns: Any, column_start: Any, row: Any, count: Any, channels: Any,
) -> Any:  # fmt: skip
    """Compute ``columns[column_start + t*row + c] = sum of weight * image[image_start + corner*width + c]``.

    The sum has four terms, of which `corners` [4, STRIP] and `weights` [4, STRIP] start at the given positions.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        strip = _Strip(context, builder, signature, args)

        def body(position: Any, width: int) -> None:
            with cgutils.for_range(builder, strip.count) as loop:
                total = None
                for number, start in enumerate(strip.corner_starts(loop.index)):
                    weight = strip.weights.element(builder.add(loop.index, loop.index.type(number * STRIP)))
                    values = strip.image.load(builder.add(start, position), width)
                    factors = broadcast(builder, weight, values.type)
                    if total is None:
                        total = builder.fmul(factors, values, flags=("contract",))
                    else:
                        total = _multiply_add(builder, factors, values, total)
                strip.columns.store(total, builder.add(strip.column_start(loop.index), position))

        _for_pieces(builder, strip.channels, strip.image.lanes, body)
        return context.get_dummy_value()

    return _Strip.signature(image, corners, weights, columns), generate


@intrinsic  # type: ignore[untyped-decorator]
def scatter_strip(
    typing_context: Any, image: Any, image_start: Any, width: Any, corners: Any, corner_start: Any, weights: Any,
    weight_start: Any, columns: Any, column_start: Any, row: Any, count: Any, channels: Any,
) -> Any:  # fmt: skip
    """Add the transpose of `blend_strip` to `image`, in the order of t."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        strip = _Strip(context, builder, signature, args)

        def body(position: Any, width: int) -> None:
            with cgutils.for_range(builder, strip.count) as loop:
                values = strip.columns.load(builder.add(strip.column_start(loop.index), position), width)
                for number, start in enumerate(strip.corner_starts(loop.index)):
                    weight = strip.weights.element(builder.add(loop.index, loop.index.type(number * STRIP)))
                    factors = broadcast(builder, weight, values.type)
                    target = builder.add(start, position)
                    strip.image.store(
                        _multiply_add(builder, factors, values, strip.image.load(target, width)), target
                    )  # fmt: skip

        _for_pieces(builder, strip.channels, strip.image.lanes, body)
        return context.get_dummy_value()

    return _Strip.signature(image, corners, weights, columns), generate


@intrinsic  # type: ignore[untyped-decorator]
def dot_strip(
    typing_context: Any, image: Any, image_start: Any, width: Any, corners: Any, corner_start: Any, sums: Any,
    sum_start: Any, columns: Any, column_start: Any, row: Any, count: Any, channels: Any,
) -> Any:  # fmt: skip
    """Add the dot products of the rows of `columns` and of the four corners over the channels to `sums` [4, STRIP]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        strip = _Strip(context, builder, signature, args)
        lanes = max(4, strip.image.lanes)
        zeros = ir.Constant(ir.VectorType(strip.image.scalar, lanes), [0.0] * lanes)
        totals = [cgutils.alloca_once(builder, zeros.type) for _ in range(4)]
        with cgutils.for_range(builder, strip.count) as loop:
            starts = strip.corner_starts(loop.index)
            for total in totals:
                builder.store(zeros, total)

            def body(position: Any, width: int) -> None:
                factors = strip.columns.load(builder.add(strip.column_start(loop.index), position), width)
                for start, total in zip(starts, totals):
                    values = strip.image.load(builder.add(start, position), width)
                    product = builder.fmul(factors, values, flags=("contract",))
                    if width < lanes:
                        nothing = ir.Constant(product.type, [0.0] * width)
                        product = _shuffled(builder, product, nothing, [min(lane, width) for lane in range(lanes)])
                    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)

            _for_pieces(builder, strip.channels, lanes, body)
            sums = _lane_sums(builder, [builder.load(total) for total in totals])
            for number in range(4):
                position = builder.add(loop.index, loop.index.type(number * STRIP))
                lane = _shuffled(builder, sums, sums, [number])
                strip.weights.store(builder.fadd(strip.weights.load(position, 1), lane), position)
        return context.get_dummy_value()

    return _Strip.signature(image, corners, sums, columns), generate


def _lane_sums(builder: Any, vectors: list[Any]) -> Any:
    """Return the sums over the lanes of four vectors: halve two vectors into one, then all, down to a lane for each."""
    part = vectors[0].type.count
    while part > 1:
        part //= 2
        pairs = list(zip(vectors[::2], vectors[1::2])) or [(vectors[0], None)]
        vectors = [_halved(builder, a, b, part) for a, b in pairs]
    return vectors[0]


def _halved(builder: Any, a: Any, b: Any, part: int) -> Any:
    """Add the second half of each run of ``2 * part`` lanes of `a` and `b` to the first."""
    lanes = a.type.count * (1 if b is None else 2)
    low = [lane for lane in range(lanes) if not lane & part]
    high = [lane for lane in range(lanes) if lane & part]
    other = a if b is None else b
    return builder.fadd(_shuffled(builder, a, other, low), _shuffled(builder, a, other, high))


def _shuffled(builder: Any, a: Any, b: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


@intrinsic  # type: ignore[untyped-decorator]
def transpose(
    typing_context: Any, source: Any, source_start: Any, source_row: Any, rows: Any, columns: Any, target: Any,
    target_start: Any, outer: Any, inner: Any, period: Any,
) -> Any:  # fmt: skip
    """Copy rows of `source` to columns of `target`; full tiles are transposed in registers.

    Set ``target[target_start + j//period*outer + j%period*inner + r] = source[source_start + r*source_row + j]`` for
    ``0 <= r < rows`` and ``0 <= j < columns``.
    """
    integer = types.intp

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source_array, source_start, *sizes, target_array, target_start, outer, inner, period = args
        source = _Elements.of(context, builder, signature.args[0], source_array, source_start)
        target = _Elements.of(context, builder, signature.args[5], target_array, target_start)
        function = _transpose_function(builder.module, source, outer.type)
        builder.call(function, [source.pointer, target.pointer, *sizes, outer, inner, period])
        return context.get_dummy_value()

    return types.void(source, integer, integer, integer, integer, target, *[integer] * 4), generate


def _transpose_function(module: Any, elements: _Elements, index: Any) -> Any:
    """Return the function that `transpose` calls: a kernel that transposes in several places compiles it once."""
    name = f"transpose_{elements.scalar}"
    if name in module.globals:
        return module.globals[name]
    pointer = elements.pointer.type
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer, pointer, *[index] * 6]), name)
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    source, target = (_Elements(builder, argument, elements.itemsize) for argument in function.args[:2])
    source_row, rows, columns, outer, inner, period = function.args[2:]
    lanes = source.lanes

    def source_position(r: Any, j: Any) -> Any:
        return builder.add(builder.mul(r, source_row), j)

    def target_position(r: Any, quotient: Any, remainder: Any) -> Any:
        return builder.add(builder.add(builder.mul(quotient, outer), builder.mul(remainder, inner)), r)

    def copy_tile(r: Any, j: Any) -> None:
        row_numbers = [builder.add(r, index(number)) for number in range(lanes)]
        tile = _transposed(builder, [source.load(source_position(row, j), lanes) for row in row_numbers])
        quotient, remainder = builder.udiv(j, period), builder.urem(j, period)
        for vector in tile:
            target.store(vector, target_position(r, quotient, remainder))
            remainder = builder.add(remainder, index(1))
            wraps = builder.icmp_signed("==", remainder, period)
            quotient = builder.select(wraps, builder.add(quotient, index(1)), quotient)
            remainder = builder.select(wraps, index(0), remainder)

    def copy_edge(r: Any, j: Any, last_row: Any, last_column: Any) -> None:
        with (
            cgutils.for_range_slice(builder, r, last_row, index(1), index) as (row, _),
            cgutils.for_range_slice(builder, j, last_column, index(1), index) as (column, _),
        ):
            position = target_position(row, builder.udiv(column, period), builder.urem(column, period))
            target.store(source.load(source_position(row, column), 1), position)

    with cgutils.for_range_slice(builder, index(0), rows, index(lanes), index) as (r, _):
        last_row = builder.add(r, index(lanes))
        with cgutils.for_range_slice(builder, index(0), columns, index(lanes), index) as (j, _):
            last_column = builder.add(j, index(lanes))
            is_full = builder.and_(
                builder.icmp_signed("<=", last_row, rows), builder.icmp_signed("<=", last_column, columns)
            )
            with builder.if_else(is_full, likely=True) as (full, edge):
                with full:
                    copy_tile(r, j)
                with edge:
                    copy_edge(r, j, _smaller(builder, last_row, rows), _smaller(builder, last_column, columns))
    builder.ret_void()
    return function


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of a square tile: exchange its quarters, then the quarters of each quarter, and so on."""
    half = len(rows) // 2
    while half:
        exchanged = list(rows)
        for number, row in enumerate(rows):
            if not number & half:
                other = rows[number + half]
                lanes = range(len(rows))
                left = [lane if not lane & half else len(rows) + lane - half for lane in lanes]
                right = [lane + half if not lane & half else len(rows) + lane for lane in lanes]
                exchanged[number] = _shuffled(builder, row, other, left)
                exchanged[number + half] = _shuffled(builder, row, other, right)
        rows = exchanged
        half //= 2
    return rows


def _smaller(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.icmp_signed("<", a, b), a, b)


def _interpreted_strip(
    image: Any, image_start: int, width: int, corners: Any, corner_start: int, weights: Any, weight_start: int,
    columns: Any, column_start: int, row: int, count: int, channels: int,
) -> Any:  # fmt: skip
    """Yield four corners of each sampling point: the image's channels, the weight as an array, and the row."""
    image, corners, weights, columns = (array.reshape(-1) for array in (image, corners, weights, columns))
    for t in range(count):
        for number in range(4):
            pixel = image_start + int(corners[corner_start + number * STRIP + t]) * width
            at = weight_start + number * STRIP + t
            start = column_start + t * row
            yield image[pixel : pixel + channels], weights[at : at + 1], columns[start : start + channels], number


def _interpreted_blend_strip(*args: Any) -> None:
    for values, weight, column, number in _interpreted_strip(*args):
        column[:] = weight * values + (column if number else 0)


def _interpreted_scatter_strip(*args: Any) -> None:
    for values, weight, column, _ in _interpreted_strip(*args):
        values += weight * column


def _interpreted_dot_strip(*args: Any) -> None:
    for values, total, column, _ in _interpreted_strip(*args):
        total += values @ column


def _interpreted_transpose(
    source: Any, source_start: int, source_row: int, rows: int, columns: int, target: Any, target_start: int,
    outer: int, inner: int, period: int,
) -> None:  # fmt: skip
    """Compute `transpose` without the compiler."""
    source, target = source.reshape(-1), target.reshape(-1)
    for j in range(columns):
        start = target_start + j // period * outer + j % period * inner
        target[start : start + rows] = source[source_start + j :: source_row][:rows]


if INTERPRETED:
    tile_product = _interpreted_tile_product
    blend_strip = _interpreted_blend_strip
    scatter_strip = _interpreted_scatter_strip
    dot_strip = _interpreted_dot_strip
    transpose = _interpreted_transpose
