"""What the functions that a network calls do to the place of a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .places import Grid, Place, extents


class Call(NamedTuple):
    """A function's arguments, by position or name; the tensors with a place among them, and one of its results."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    sources: Sequence[Tensor]
    places: Sequence[Place]
    result: Tensor

    def get(self, position: int, name: str, default: Any) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def pair(self, position: int, name: str, default: Any) -> tuple[int, int]:
        value = self.get(position, name, default)
        if value is None or (isinstance(value, Sequence) and not value):
            value = default
        if isinstance(value, Integral):
            return int(value), int(value)
        return (value[0], value[-1])

    def axis(self, position: int, name: str) -> int:
        return int(self.get(position, name, 0)) % self.sources[0].ndim


def other_move(call: Call) -> Place | None:
    """What leaves the size of one of its maps alone, reshapes it, or gives it another size."""
    result = call.result
    maps = [
        place
        for place, source in zip(call.places, call.sources)
        if place.axes is not None and source.ndim == result.ndim
    ]
    same = [place for place in maps if place.axes is not None and extents(result, place.axes) == place.size]
    if same:
        return min(same, key=lambda place: place.stretches)
    if result.ndim == 4 and maps and maps[0].axes == (2, 3):
        return _stretched(maps[0], result)
    for place in call.places:
        height, width = place.size
        pairs = [axis for axis in range(result.ndim - 1) if result.shape[axis : axis + 2] == place.size]
        if pairs:
            return place._replace(axes=(pairs[-1], pairs[-1] + 1))
        if height * width in result.shape:
            return place._replace(axes=None)
    return None


def _stretched(place: Place, result: Tensor, align_corners: bool = False) -> Place:
    size = extents(result, (2, 3))
    return Place(place.grid.stretched(place.size, size, align_corners), size, stretches=place.stretches + 1)


def _reordered(call: Call) -> Place | None:
    place, source = call.places[0], call.sources[0]
    if place.axes is None or not call.args or call.args[0] is not source:
        return other_move(call)
    # Where the dimensions go is seen on a tensor whose extents are all different.
    marked = torch.empty(tuple(range(1, source.ndim + 1)), device="meta")
    order = [extent - 1 for extent in call.function(marked, *call.args[1:], **call.kwargs).shape]
    return place._replace(axes=(order.index(place.axes[0]), order.index(place.axes[1])))


def sliced(place: Place, result: Tensor, slices: Mapping[int, tuple[int, int]]) -> Place | None:
    """The place of each `step`-th row and column from a first one on; of other dimensions nothing matters."""
    if place.axes is None:
        return None
    first, step = zip(*(slices.get(axis, (0, 1)) for axis in place.axes))
    return place.moved(result, place.grid.after(first, step))


def _indexed(call: Call) -> Place | None:
    place, source = call.places[0], call.sources[0]
    if place.axes is None or call.get(0, "self", None) is not source:
        return other_move(call)
    index = call.get(1, "index", ())
    items = list(index) if isinstance(index, tuple) else [index]
    missing = [slice(None)] * (source.ndim - sum(item is not None and item is not Ellipsis for item in items))
    middle = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    items[middle : middle + 1] = missing
    slices: dict[int, tuple[int, int]] = {}
    axes: list[int] = []  # of the source, for each of the result
    axis, lists = 0, 0
    for item in items:
        if item is None:
            axes.append(-1)
            continue
        if isinstance(item, slice):
            first, _, step = item.indices(source.shape[axis])
            slices[axis] = first, step
            axes.append(axis)
        elif isinstance(item, Integral):
            pass
        elif isinstance(item, (list, range)) or (isinstance(item, Tensor) and item.ndim == 1):
            lists += 1
            axes.append(-1)
        else:
            return None
        axis += 1
    if lists > 1 or not set(place.axes) <= set(axes):
        return None
    steps = [slices[axis] for axis in place.axes]
    grid = place.grid.after([begin for begin, _ in steps], [step for _, step in steps])
    rows, columns = (axes.index(axis) for axis in place.axes)
    return place._replace(axes=(rows, columns)).moved(call.result, grid)


def _narrowed(call: Call) -> Place | None:
    axis = call.axis(1, "dim")
    return sliced(call.places[0], call.result, {axis: (int(call.get(2, "start", 0)) % call.sources[0].shape[axis], 1)})


def _padded(call: Call) -> Place | None:
    # Both sides of the last dimension come first.
    sides, count = call.get(1, "pad", ()), call.sources[0].ndim
    before = {count - 1 - number: (-side, 1) for number, side in enumerate(sides[::2])}
    return sliced(call.places[0], call.result, before)


def _joined(call: Call) -> Place | None:
    axis, parts = call.axis(1, "dim"), call.get(0, "tensors", ())
    place = min(call.places, key=lambda place: place.stretches)
    if place.axes is None or any(other.axes != place.axes for other in call.places):
        return other_move(call)
    if axis in place.axes:
        # Where the largest part says, as that is the middle where a map is wrapped around.
        source, place = max(zip(call.sources, call.places), key=lambda pair: pair[0].shape[axis])
        number = next(number for number, part in enumerate(parts) if part is source)
        begin = sum(part.shape[axis] for part in parts[:number])
        return sliced(place, call.result, {axis: (-begin, 1)})
    # In the middle, as where every second pixel was taken of rows and columns.
    level = [other.grid for other in call.places if other.stretches == place.stretches]
    if any(grid.scale != place.grid.scale for grid in level):
        return place
    top, left = (sum(shifts) / len(level) for shifts in zip(*(grid.shift for grid in level)))
    return place._replace(grid=Grid(place.grid.scale, (top, left)))


def _windows(place: Place, call: Call, first: int, dilated: bool) -> Place | None:
    """A pooling whose arguments begin with the size of its windows at a position."""
    if place.axes != (2, 3):
        return None
    kernel = call.pair(first, "kernel_size", 1)
    stride, padding = call.pair(first + 1, "stride", kernel), call.pair(first + 2, "padding", 0)
    dilation = call.pair(first + 3, "dilation", 1) if dilated else (1, 1)
    return place.moved(call.result, place.grid.windows(kernel, stride, padding, dilation))


def _max_pool(call: Call) -> Place | None:
    return _windows(call.places[0], call, 1, dilated=True)


def _average_pool(call: Call) -> Place | None:
    return _windows(call.places[0], call, 1, dilated=False)


def _power_pool(call: Call) -> Place | None:
    place = call.places[0]
    if place.axes != (2, 3):
        return None
    kernel = call.pair(2, "kernel_size", 1)
    return place.moved(call.result, place.grid.windows(kernel, call.pair(3, "stride", kernel), (0, 0), (1, 1)))


def _interpolated(call: Call) -> Place | None:
    place, result = call.places[0], call.result
    if place.axes != (2, 3):
        return None
    factors = call.get(2, "scale_factor", None)
    if call.get(4, "align_corners", False):
        return _stretched(place, result, align_corners=True)
    if factors is None or call.get(5, "recompute_scale_factor", False) or call.get(3, "mode", "nearest") == "area":
        return _stretched(place, result)
    # The factor counts where the result's size is not exactly that many times the map's.
    down, right = factors if isinstance(factors, Sequence) else (factors, factors)
    centre = [(1 / factor - 1) / 2 for factor in (down, right)]
    return place.moved(result, place.grid.after(centre, (1 / down, 1 / right)))


def _transposed_convolution(call: Call) -> Place | None:
    place = call.places[0]
    if place.axes != (2, 3) or call.sources[0] is not call.get(0, "input", None):
        return None
    weight = call.get(1, "weight", None)
    stride, padding = call.pair(3, "stride", 1), call.pair(4, "padding", 0)
    dilation = call.pair(7, "dilation", 1)
    first = [(p - d * (k - 1) / 2) / s for k, s, p, d in zip(weight.shape[2:], stride, padding, dilation)]
    return place.moved(call.result, place.grid.after(first, [1 / s for s in stride]))


MOVES: dict[str, Callable[[Call], Place | None]] = {
    "__getitem__": _indexed,
    "avg_pool2d": _average_pool,
    "cat": _joined,
    "concat": _joined,
    "concatenate": _joined,
    "conv_transpose2d": _transposed_convolution,
    "interpolate": _interpolated,
    "lp_pool2d": _power_pool,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "moveaxis": _reordered,
    "movedim": _reordered,
    "narrow": _narrowed,
    "pad": _padded,
    "permute": _reordered,
    "swapaxes": _reordered,
    "swapdims": _reordered,
    "transpose": _reordered,
}
"""By the functions' names; any other is `other_move`."""
