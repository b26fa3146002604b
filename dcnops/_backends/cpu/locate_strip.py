"""Location of the sampling points of a strip, generated as vector code.

The formulas stand here once, for LLVM and for NumPy. As vectors they take a fraction of the time to compile that the
loop in Python takes, which LLVM has to vectorise. Nothing is contracted to a fused multiply-add, which could move a
coordinate to the other side of a kink.

Numba does not recompile loops if this file changes: delete the `__pycache__` next to it after an edit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from dcnops._backends.cpu.compiled import CACHE_LINE, INTERPRETED, generate_prefetch
from dcnops._backends.cpu.vectors import STRIP, VECTOR_BYTES, broadcast


def _located(
    dy: Any, dx: Any, modulation: Any, base_y: Any, base_x: Any, rows: tuple[Any, Any], columns: tuple[Any, Any],
    zero_pixel: Any, where: Callable[[Any, Any, Any], Any], floor: Callable[[Any], Any],
    pixel_index: Callable[[Any], Any],
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """Return the eight corners and the seven weights of `locate_strip`.

    `rows` and `columns` contain the extent of the image twice: as a coordinate and as a pixel index.
    """
    height, H = rows
    width, W = columns
    y = base_y + dy
    x = base_x + dx
    inside = (y > -1.0) & (y < height) & (x > -1.0) & (x < width)
    lost = (y != y) | (x != x)
    floor_y = where(inside, floor(y), 0.0)
    floor_x = where(inside, floor(x), 0.0)
    rest = where(lost, math.nan, 0.0)
    ly = where(inside, y - floor_y, rest)
    lx = where(inside, x - floor_x, rest)
    hy = 1.0 - ly
    hx = 1.0 - lx
    row = pixel_index(floor_y)
    column = pixel_index(floor_x)
    top = inside & (row >= 0)
    bottom = inside & (row < H - 1)
    left = column >= 0
    right = column < W - 1
    pixel = row * W + column
    modulation = where(inside, modulation, 1.0)
    corners, contributing, weights = [], [], []
    for valid, index, bilinear in (
        (top & left, pixel, hy * hx),
        (top & right, pixel + 1, hy * lx),
        (bottom & left, pixel + W, ly * hx),
        (bottom & right, pixel + W + 1, ly * lx),
    ):
        corner = where(valid, index, zero_pixel)
        weight = where((valid | lost) & (bilinear != 0.0), bilinear * modulation, 0.0)
        corners.append(corner)
        contributing.append(where(weight != 0.0, corner, zero_pixel))
        weights.append(weight)
    return corners + contributing, [*weights, ly, lx, modulation]


class _Lanes:
    """Vector of generated code with the operators that `_located` needs."""

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def _constant(self, number: float) -> Any:
        kind = self.value.type
        return ir.Constant(kind, [number] * kind.count)

    def _value_of(self, operand: Any) -> Any:
        return operand.value if isinstance(operand, _Lanes) else self._constant(operand)

    def _binary(self, floating: str, integer: str, a: Any, b: Any) -> _Lanes:
        name = integer if isinstance(self.value.type.element, ir.IntType) else floating
        return _Lanes(self.builder, getattr(self.builder, name)(a, b))

    def _compare(self, relation: str, other: Any) -> _Lanes:
        a, b = self.value, self._value_of(other)
        if isinstance(self.value.type.element, ir.IntType):
            return _Lanes(self.builder, self.builder.icmp_signed(relation, a, b))
        compare = self.builder.fcmp_unordered if relation == "!=" else self.builder.fcmp_ordered
        return _Lanes(self.builder, compare(relation, a, b))

    def __add__(self, other: Any) -> _Lanes:
        return self._binary("fadd", "add", self.value, self._value_of(other))

    def __sub__(self, other: Any) -> _Lanes:
        return self._binary("fsub", "sub", self.value, self._value_of(other))

    def __rsub__(self, other: Any) -> _Lanes:
        return self._binary("fsub", "sub", self._value_of(other), self.value)

    def __mul__(self, other: Any) -> _Lanes:
        return self._binary("fmul", "mul", self.value, self._value_of(other))

    def __and__(self, other: _Lanes) -> _Lanes:
        return _Lanes(self.builder, self.builder.and_(self.value, other.value))

    def __or__(self, other: _Lanes) -> _Lanes:
        return _Lanes(self.builder, self.builder.or_(self.value, other.value))

    def __gt__(self, other: Any) -> _Lanes:
        return self._compare(">", other)

    def __ge__(self, other: Any) -> _Lanes:
        return self._compare(">=", other)

    def __lt__(self, other: Any) -> _Lanes:
        return self._compare("<", other)

    def __ne__(self, other: Any) -> Any:
        return self._compare("!=", other)

    __hash__ = None  # type: ignore[assignment]


@intrinsic  # type: ignore[untyped-decorator]
def locate_strip(
    typing_context: Any, offset: Any, offset_y_start: Any, offset_x_start: Any, mask: Any, mask_start: Any,
    modulated: Any, corners: Any, corner_start: Any, weights: Any, weight_start: Any, base_y: Any, base_x: Any,
    step_x: Any, H: Any, W: Any, count: Any,
) -> Any:  # fmt: skip
    """Locate the sampling points (base_y + offset_y, base_x + t*step_x + offset_x) for ``0 <= t < count``.

    Write `corners` [8, STRIP] and, to `weights` [7, STRIP], the weights of the four corners, ly, lx and the mask, which
    is not read unless `modulated`. Elements beyond `count` are undefined. The offsets and mask of the next strip are
    prefetched, which with many groups come from more pages than a CPU follows. See `_locate_samples`.
    """
    integer = types.intp

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        offset, offset_y_start, offset_x_start, mask, mask_start, modulated, *args = args
        corners, corner_start, weights, weight_start, base_y, base_x, step_x, H, W, count = args
        scalar = context.get_value_type(signature.args[0].dtype)
        itemsize = context.get_abi_sizeof(scalar)
        index = count.type
        lanes = VECTOR_BYTES // itemsize
        reals, integers, pixels = (ir.VectorType(kind, lanes) for kind in (scalar, index, ir.IntType(32)))
        selection = ir.VectorType(ir.IntType(1), lanes)
        masked_load = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(reals, [reals.as_pointer(), ir.IntType(32), selection, reals]),
            f"llvm.masked.load.v{lanes}{scalar.intrinsic_name}.p0",
        )
        floor_function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(reals, [reals]), f"llvm.floor.v{lanes}{scalar.intrinsic_name}"
        )

        def start(array: Any, array_type: Any, position: Any) -> Any:
            return builder.gep(context.make_array(array_type)(context, builder, array).data, [position])

        def address(first: Any, number: int, t: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(first, [builder.add(t, index(number * STRIP))]), kind.as_pointer())

        def everywhere(value: Any) -> Any:
            return broadcast(builder, value, ir.VectorType(value.type, lanes))

        def real(value: Any) -> _Lanes:
            return _Lanes(builder, everywhere(builder.sitofp(value, scalar)))

        def pixel(value: Any) -> _Lanes:
            return _Lanes(builder, everywhere(builder.trunc(value, pixels.element)))

        def where(condition: _Lanes, a: Any, b: Any) -> _Lanes:
            kind = next((operand.value.type for operand in (a, b) if isinstance(operand, _Lanes)), reals)
            chosen = (x.value if isinstance(x, _Lanes) else ir.Constant(kind, [x] * lanes) for x in (a, b))
            return _Lanes(builder, builder.select(condition.value, *chosen))

        def floor(x: _Lanes) -> _Lanes:
            return _Lanes(builder, builder.call(floor_function, [x.value]))

        def pixel_index(x: _Lanes) -> _Lanes:
            return _Lanes(builder, builder.fptosi(x.value, pixels))

        first_corner = start(corners, signature.args[6], corner_start)
        first_weight = start(weights, signature.args[8], weight_start)
        first_dy = start(offset, signature.args[0], offset_y_start)
        first_dx = start(offset, signature.args[0], offset_x_start)
        first_modulation = start(mask, signature.args[3], mask_start)
        for first in (first_dy, first_dx, first_modulation):
            for element in range(0, STRIP, CACHE_LINE // itemsize):
                generate_prefetch(builder, builder.gep(first, [builder.add(count, index(element))]))
        all_modulated = broadcast(builder, modulated, selection)
        ones = ir.Constant(reals, [1.0] * lanes)
        rows, columns = (real(H), pixel(H)), (real(W), pixel(W))
        zero_pixel = pixel(builder.mul(H, W))
        first_y = real(base_y)
        steps = builder.mul(everywhere(step_x), ir.Constant(integers, list(range(lanes))))
        with cgutils.for_range_slice(builder, index(0), count, index(lanes), index) as (t, _):
            start_x = builder.add(everywhere(builder.add(base_x, builder.mul(t, step_x))), steps)
            positions = builder.add(everywhere(t), ir.Constant(integers, list(range(lanes))))
            present = builder.icmp_signed("<", positions, everywhere(count))

            def given(first: Any, present: Any = present, t: Any = t) -> _Lanes:
                arguments = address(first, 0, t, reals), ir.IntType(32)(itemsize), present, ones
                return _Lanes(builder, builder.call(masked_load, arguments))

            dy, dx = given(first_dy), given(first_dx)
            modulation = given(first_modulation, builder.and_(present, all_modulated))
            located = _located(
                dy, dx, modulation, first_y, _Lanes(builder, builder.sitofp(start_x, reals)),
                rows, columns, zero_pixel, where, floor, pixel_index,
            )  # fmt: skip
            for first, vectors, kind in zip((first_corner, first_weight), located, (pixels, reals)):
                for number, vector in enumerate(vectors):
                    alignment = context.get_abi_sizeof(kind.element)
                    builder.store(vector.value, address(first, number, t, kind), align=alignment)
        return context.get_dummy_value()

    signature = types.void(
        offset, integer, integer, mask, integer, types.boolean, corners, integer, weights, *[integer] * 7
    )
    return signature, generate


def _interpreted_locate_strip(
    offset: Any, offset_y_start: int, offset_x_start: int, mask: Any, mask_start: int, modulated: bool, corners: Any,
    corner_start: int, weights: Any, weight_start: int, base_y: int, base_x: int, step_x: int, H: int, W: int,
    count: int,
) -> None:  # fmt: skip
    """Compute `locate_strip` without the compiler."""
    real = weights.dtype.type
    corner_rows = corners[corner_start : corner_start + 8 * STRIP].reshape(8, STRIP)[:, :count]
    weight_rows = weights[weight_start : weight_start + 7 * STRIP].reshape(7, STRIP)[:, :count]
    start_x = (base_x + step_x * np.arange(count)).astype(real)
    dy, dx = (offset.reshape(-1)[start : start + count] for start in (offset_y_start, offset_x_start))
    modulation = mask.reshape(-1)[mask_start : mask_start + count] if modulated else real(1)
    corner_rows[:], weight_rows[:] = _located(
        dy, dx, modulation, real(base_y), start_x, (real(H), H), (real(W), W), H * W,
        lambda condition, a, b: np.where(condition, a, b), np.floor, lambda x: x.astype(np.int32),
    )  # fmt: skip


if INTERPRETED:
    locate_strip = _interpreted_locate_strip
