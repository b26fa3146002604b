"""Checks of all non-array arguments: pairs, padding, sampling parameters, layout, needs and precision.

All functions raise an `ArgumentError` for an illegal value.
"""

from __future__ import annotations

import itertools
import math
import operator
import reprlib
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeAlias

from dcnops._errors import ArgumentError
from dcnops._layout import LAYOUTS, Layout

Pair: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
Points: TypeAlias = int | Sequence[int]
SpatialShapes: TypeAlias = Any
"""Pairs (height, width): a sequence of them, or an integer array [L, 2]."""

PRECISIONS = ("ieee", "tf32", "3xtf32")

MAX_EXTENT = 2**24
"""Largest padded extent: float32 coordinates represent every integer up to here exactly."""

MAX_LEVELS = 64
"""Largest number of levels of multi-scale attention."""

MAX_FACTOR = (2 - 2**-23) * 2.0**127
"""Largest spatial_scale and gamma: the largest finite float32."""

_MAX_NAMES = 100

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


def expand_pair(name: str, value: Pair, minimum: int = 1) -> tuple[int, int]:
    """Expand an integer or a pair of integers, each at least `minimum`, to (vertical, horizontal)."""
    # Fast path for plain integers and pairs of them; everything else goes through the slower conversions below.
    plain: Any = (value, value) if type(value) is int else value
    if type(plain) in (tuple, list) and len(plain) == 2:
        vertical, horizontal = plain
        if (
            type(vertical) is type(horizontal) is int
            and minimum <= vertical <= MAX_EXTENT
            and minimum <= horizontal <= MAX_EXTENT
        ):
            return vertical, horizontal
    items = _sequence(value)
    numbers = [as_integer(item) for item in ([value, value] if items is None else items)]
    if len(numbers) == 2:
        first, second = numbers
        if (
            first is not None
            and second is not None
            and minimum <= min(first, second) <= max(first, second) <= MAX_EXTENT
        ):
            return first, second
    raise ArgumentError(
        f"{name} must be an integer from {minimum} to {MAX_EXTENT} or a pair of them, got {shown(value)}"
    )


def expand_padding(value: Padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """Convert any form of padding to ((top, bottom), (left, right)), the only form used inside the library."""
    items = None if type(value) is int else _sequence(value)
    try:
        if items is not None and len(items) == 2 and all(_sequence(item) is not None for item in items):
            vertical, horizontal = items
            return expand_pair("padding", vertical, 0), expand_pair("padding", horizontal, 0)  # type: ignore[arg-type]
        height, width = expand_pair("padding", value, 0)  # type: ignore[arg-type]
    except ArgumentError:
        raise ArgumentError(
            f"padding must be an integer from 0 to {MAX_EXTENT}, a pair (vertical, horizontal) "
            f"or ((top, bottom), (left, right)), got {shown(value)}"
        ) from None
    return (height, height), (width, width)


def check_sampling(sampling_ratio: int, spatial_scale: float, gamma: float) -> tuple[int, float, float]:
    """Check the sampling parameters of RoI pooling and return them as plain Python numbers."""
    ratio, scale, factor = as_integer(sampling_ratio), _number(spatial_scale), _number(gamma)
    if ratio is None or not 0 <= ratio <= MAX_EXTENT:
        raise ArgumentError(f"sampling_ratio must be an integer from 0 to {MAX_EXTENT}, got {shown(sampling_ratio)}")
    if scale is None or scale <= 0:
        raise ArgumentError(f"spatial_scale must be a positive finite number, got {shown(spatial_scale)}")
    if factor is None:
        raise ArgumentError(f"gamma must be a finite number, got {shown(gamma)}")
    for name, number in (("spatial_scale", scale), ("gamma", factor)):
        if abs(number) > MAX_FACTOR:
            raise ArgumentError(f"{name} must be a finite float32, of at most {MAX_FACTOR:.7g} in size, got {number}")
    return ratio, scale, factor


def check_offset_scale(offset_scale: float) -> float:
    """Check the factor of the offsets of deformable aggregation and return it as a plain Python number."""
    scale = _number(offset_scale)
    if scale is None or abs(scale) > MAX_FACTOR:
        raise ArgumentError(f"offset_scale must be a finite float32, got {shown(offset_scale)}")
    return scale


def expand_spatial_shapes(spatial_shapes: SpatialShapes) -> tuple[tuple[int, int], ...]:
    """Return the height and width of each level as Python integers."""
    items = _sequence(spatial_shapes, MAX_LEVELS + 1)
    pairs = []
    for item in items or ():
        numbers = [as_integer(number) for number in _sequence(item) or ()]
        if len(numbers) != 2 or not all(number is not None and 1 <= number <= MAX_EXTENT for number in numbers):
            break
        pairs.append((numbers[0], numbers[1]))
    if not items or len(pairs) != len(items) or len(items) > MAX_LEVELS:
        raise ArgumentError(
            f"spatial_shapes must be 1 to {MAX_LEVELS} pairs (height, width) of integers from 1 to {MAX_EXTENT}, "
            f"got {shown(spatial_shapes)}"
        )
    return tuple(pairs)  # type: ignore[arg-type]


def expand_points(points: Points | None, levels: int) -> tuple[bool, tuple[int, ...] | None]:
    """Return True if `points` is a sequence, and the number of points of each level (None if not given)."""
    if points is None:
        return False, None
    items = _sequence(points, levels + 1)
    numbers = [as_integer(item) for item in ([points] * levels if items is None else items)]
    if len(numbers) != levels or not all(number is not None and 1 <= number <= MAX_EXTENT for number in numbers):
        raise ArgumentError(
            f"points must be a positive integer or a sequence of L={levels} positive integers, got {shown(points)}"
        )
    return items is not None, tuple(numbers)  # type: ignore[arg-type]


def check_layout(layout: object) -> Layout:
    """Return the `Layout` with the given name."""
    known = LAYOUTS.get(layout) if isinstance(layout, str) else None
    if known is None:
        raise ArgumentError(f"layout must be 'NCHW' or 'NHWC', got {shown(layout)}")
    return known


def check_needs(needs: Iterable[str], **arguments: object) -> frozenset[str]:
    """Return the names in `needs` for which the call has an argument other than None."""
    try:
        names = [needs] if isinstance(needs, str) else list(itertools.islice(needs, _MAX_NAMES + 1))
        wanted = frozenset(names)
    except TypeError:
        names, wanted = [], frozenset([""])
    if len(names) > _MAX_NAMES or not wanted <= arguments.keys():
        raise ArgumentError(f"needs must be names among {', '.join(arguments)}, got {shown(needs)}")
    return frozenset(name for name in wanted if arguments[name] is not None)


def check_precision(precision: object) -> None:
    """Check a precision; None means that the array library's own setting applies."""
    if precision is not None and not (isinstance(precision, str) and precision in PRECISIONS):
        raise ArgumentError(f"precision must be None, 'ieee', 'tf32' or '3xtf32', got {shown(precision)}")


def shown(value: object) -> str:
    """Return `repr(value)` for an error message: shortened, and a description if there is no such text."""
    try:
        return _REPR.repr(value)
    except Exception:
        if isinstance(value, int):
            return f"an integer of {value.bit_length()} bits"
        return f"an object of type {type(value).__qualname__}"


def as_integer(value: object) -> int | None:
    """Return a Python integer for anything that stands for one, and None for anything else."""
    if type(value) is int:
        return value
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        # NumPy's bool has no index, unlike Python's.
        is_bool = type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")
        return int(bool(value)) if is_bool else None


def _number(value: object) -> float | None:
    """Return a finite real number as a float, and None for anything else."""
    if not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    # Not `math.isfinite`, which `torch.compile` does not trace.
    return number if -math.inf < number < math.inf else None


def _sequence(value: object, limit: int = 3) -> list[object] | None:
    """Return at most `limit` items, which is one more than in any legal value; None for anything but a sequence."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        return None
    return list(itertools.islice(value, limit))
