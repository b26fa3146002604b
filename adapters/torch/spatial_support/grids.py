"""Locations of feature maps in the image, followed through the functions that a network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

LOST = "cannot be located: it is no map [N, C, H, W] made of the image, or was made in a way that cannot be followed"
ROUNDING = 1e-9  # pixels: error of a position after its conversion to another grid


class Grid(NamedTuple):
    """Positions of a map's pixels in the image: ``image = scale * map + shift``, vertical and horizontal.

    Attributes
    ----------
    scale : (float, float)
        Distance between neighbouring pixels of the map, in pixels of the image.
    shift : (float, float)
        Position of the map's first pixel; the centre of the image's first pixel is 0.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def to_image(self, positions: Tensor) -> Tensor:
        """Convert positions [..., 2] (y, x) in the map to positions in the image."""
        return positions * positions.new_tensor(self.scale) + positions.new_tensor(self.shift)

    def from_image(self, positions: Tensor) -> Tensor:
        """Convert positions [..., 2] (y, x) in the image to positions in the map."""
        return (positions - positions.new_tensor(self.shift)) / positions.new_tensor(self.scale)

    def convert(self, positions: Tensor, other: Grid) -> Tensor:
        """Convert positions [..., 2] (y, x) to another grid of the same image; integer positions stay integer."""
        if other == self:
            return positions
        found = other.from_image(self.to_image(positions))
        whole = found.round()
        return torch.where((found - whole).abs() < ROUNDING, whole, found)

    def resample(self, first: Sequence[float], step: Sequence[float]) -> Grid:
        """Return the grid with its first pixel at `first` of this one and a distance of `step` between its pixels."""
        (vertical, horizontal), (top, left) = self.scale, self.shift
        return Grid(
            (vertical * step[0], horizontal * step[1]), (top + vertical * first[0], left + horizontal * first[1])
        )

    def windows(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Grid:
        """Return the grid of the centres of sliding windows; `padding` is the padding at the top and left."""
        return self.resample([d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation)], stride)

    def stretch(self, before: Sequence[int], after: Sequence[int], align_corners: bool = False) -> Grid:
        """Return the grid of a map that is resized from `before` to `after` and covers the same part of the image."""
        if align_corners:
            return self.resample((0, 0), [(m - 1) / max(n - 1, 1) or 1 for m, n in zip(before, after)])
        ratios = [m / n for m, n in zip(before, after)]
        return self.resample([(ratio - 1) / 2 for ratio in ratios], ratios)


class Location(NamedTuple):
    """Location of a tensor that was computed from the image."""

    grid: Grid
    size: tuple[int, int]  # of the map
    axes: tuple[int, int] | None = (2, 3)  # dimensions of the rows and columns; None if they share one, as in tokens
    stretches: int = 0  # number of times that the map was resized by a function without an exact rule

    def move(self, result: Tensor, grid: Grid) -> Location:
        """Return the location of a result that has its rows and columns in the same dimensions."""
        assert self.axes is not None
        return self._replace(grid=grid, size=_size(result, self.axes))

    def slice(self, result: Tensor, slices: Mapping[int, tuple[int, int]]) -> Location | None:
        """Return the location of a slice, given the first index and the step for some of the dimensions."""
        if self.axes is None:
            return None
        first, step = zip(*(slices.get(axis, (0, 1)) for axis in self.axes))
        return self.move(result, self.grid.resample(first, step))

    def stretch(self, result: Tensor, align_corners: bool = False) -> Location:
        """Return the location of a map that was resized to the size of `result`."""
        size = _size(result, (2, 3))
        return Location(self.grid.stretch(self.size, size, align_corners), size, stretches=self.stretches + 1)


class Grids:
    """Grids of all maps [N, C, H, W] that were computed from an image.

    Convolutions, pooling, padding, interpolation, slices, splits and concatenations move a grid exactly. A function
    that rearranges rows or columns in another way loses it. Any other function keeps the grid if it keeps the size;
    otherwise it is assumed to stretch the map over the same part of the image. Maps are followed through permuted
    dimensions. Reshaped maps are recognised again in a later tensor of their size, as after a channel shuffle or in
    transformers.
    """

    def __init__(self, image: Tensor | None = None) -> None:
        self._locations: Any = WeakTensorKeyDictionary()  # None: computed from the image, but lost
        if image is not None:
            self._locations[image] = Location(Grid(), _size(image, (2, 3)))

    def __contains__(self, tensor: Tensor) -> bool:
        """Return True for a tensor that was computed from the image, even if its location is lost."""
        return tensor in self._locations

    def __getitem__(self, tensor: Tensor) -> Grid | None:
        """Return the grid of a map, or None if it is lost or unrelated to the image, as are pooled regions."""
        location: Location | None = self._locations.get(tensor)
        return location.grid if location is not None and location.axes == (2, 3) and tensor.ndim == 4 else None

    def convolve(
        self,
        source: Tensor,
        result: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Grid | None:
        """Record and return the grid of the result of a convolution."""
        if (grid := self[source]) is not None:
            grid = grid.windows(kernel, stride, padding, dilation)
            self._locations[result] = self._locations[source].move(result, grid)
        elif source in self:
            self._locations[result] = None
        return grid

    def follow(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """Record the locations of the results of any other function."""
        name = getattr(function, "__name__", "")
        if name == "__get__":  # a property, such as `Tensor.mT`
            name = getattr(getattr(function, "__self__", None), "__name__", "")
        arguments = [item for item in _tensors((*args, *kwargs.values())) if item in self]
        sources = [item for item in arguments if self._locations[item] is not None]
        results = list(_tensors([result]))
        if name in REGION_POOLINGS or not arguments:
            return
        for number, item in enumerate(results):
            if not item.numel() or self._locations.get(item) is not None:  # changed in place
                continue
            location = None
            if sources:
                locations = [self._locations[source] for source in sources]
                call = FunctionCall(function, args, kwargs, sources, locations, item, number)
                location = RULES.get(name, _default_rule)(call)
            # Integers are indices and sizes: a value that they select does not come from the image.
            floating = item.is_floating_point() and any(source.is_floating_point() for source in arguments)
            if location is not None or floating:
                self._locations[item] = location


class FunctionCall(NamedTuple):
    """Arguments of a function, the located tensors among them, and one of its results with its number."""

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    sources: Sequence[Tensor]
    locations: Sequence[Location]
    result: Tensor
    number: int

    def apply_to(self, tensor: Tensor) -> Tensor:
        """Call the function with a tensor in place of the first source and return result `number`."""
        args = [tensor if each is self.sources[0] else each for each in self.args]
        kwargs = {name: tensor if each is self.sources[0] else each for name, each in self.kwargs.items()}
        result = self.function(*args, **kwargs)
        return next(item for number, item in enumerate(_tensors([result])) if number == self.number)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Return an argument that may be given by position or name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def pair(self, position: int, name: str, default: Any) -> tuple[int, int]:
        """Return an argument (vertical, horizontal) that may be given as one number or left out."""
        value = self.argument(position, name, default)
        if value is None or (isinstance(value, Sequence) and not value):
            value = default
        return (int(value), int(value)) if isinstance(value, Integral) else (value[0], value[-1])


Rule: TypeAlias = Callable[[FunctionCall], Location | None]
"""Location of a result; None if it is lost."""


def _default_rule(call: FunctionCall, stretches: bool = True) -> Location | None:
    """Locate the result of a function that keeps, reshapes or resizes one of its maps."""
    result = call.result
    maps = [each for each, source in zip(call.locations, call.sources) if each.axes and source.ndim == result.ndim]
    same = [each for each in maps if each.axes is not None and _size(result, each.axes) == each.size]
    if same:
        return min(same, key=lambda each: each.stretches)
    if stretches and result.ndim == 4 and maps and maps[0].axes == (2, 3):
        return maps[0].stretch(result)
    for location in call.locations:
        height, width = location.size
        pairs = [axis for axis in range(result.ndim - 1) if result.shape[axis : axis + 2] == location.size]
        if pairs:
            return location._replace(axes=(pairs[-1], pairs[-1] + 1))
        if height * width in result.shape:
            return location._replace(axes=None)
    return None


def _reshaped(call: FunctionCall) -> Location | None:
    return _default_rule(call, stretches=False)


def _lost(call: FunctionCall) -> Location | None:
    return None


def _permuted(call: FunctionCall) -> Location | None:
    location, source = call.locations[0], call.sources[0]
    if location.axes is None or call.argument(0, "input") is not source:
        return _default_rule(call)
    # A tensor with a different size in each dimension shows the order.
    order = [size - 1 for size in call.apply_to(torch.empty(tuple(range(1, source.ndim + 1)), device="meta")).shape]
    return location._replace(axes=(order.index(location.axes[0]), order.index(location.axes[1])))


def _selected(call: FunctionCall) -> Location | None:
    """Locate the part of a map that a slice, split, flip, shift, repetition or index selects.

    The function is applied to the positions of the map. The result is lost unless its rows and columns are equally
    spaced in the order of the map.
    """
    location, source = call.locations[0], call.sources[0]
    if call.argument(0, "input") is not source:
        return None
    if location.axes is None:
        return _default_rule(call)
    axes, firsts, steps = [], [], []
    for axis in location.axes:
        shape = [-1 if each == axis else 1 for each in range(source.ndim)]
        positions = torch.arange(source.shape[axis], device=source.device).reshape(shape)
        taken = call.apply_to(positions.expand(source.shape))
        varying = [each for each in range(taken.ndim) if (taken.narrow(each, 0, 1) != taken).any()]
        if len(varying) > 1 or (not varying and taken.ndim != source.ndim):
            return None
        axes.append(varying[0] if varying else axis)
        line = taken.movedim(axes[-1], 0).flatten(1)[:, 0]
        firsts.append(int(line[0]))
        steps.append(int(line[1] - line[0]) if len(line) > 1 else 1)
        if steps[-1] < 1 or not torch.equal(line, firsts[-1] + steps[-1] * torch.arange(len(line), device=line.device)):
            return None
    if axes[0] == axes[1]:
        return None
    return location._replace(axes=(axes[0], axes[1])).move(call.result, location.grid.resample(firsts, steps))


def _padded(call: FunctionCall) -> Location | None:
    # The list begins with both sides of the last dimension.
    sides, count = call.argument(1, "pad", ()), call.sources[0].ndim
    before = {count - 1 - number: (-side, 1) for number, side in enumerate(sides[::2])}
    return call.locations[0].slice(call.result, before)


def _concatenated(call: FunctionCall) -> Location | None:
    axis, parts = int(call.argument(1, "dim", 0)) % call.sources[0].ndim, call.argument(0, "tensors", ())
    location = min(call.locations, key=lambda each: each.stretches)
    if location.axes is None or any(other.axes != location.axes for other in call.locations):
        return _default_rule(call)
    if axis in location.axes:
        # The largest part decides: in circular padding, it is the map itself.
        source, location = max(zip(call.sources, call.locations), key=lambda pair: pair[0].shape[axis])
        number = next(number for number, part in enumerate(parts) if part is source)
        begin = sum(part.shape[axis] for part in parts[:number])
        return location.slice(call.result, {axis: (-begin, 1)})
    # The mean of all parts: in a patch merging layer, each has another pixel of every 2x2.
    exact = [other.grid for other in call.locations if other.stretches == location.stretches]
    if any(grid.scale != location.grid.scale for grid in exact):
        return location
    top, left = (sum(shifts) / len(exact) for shifts in zip(*(grid.shift for grid in exact)))
    return location._replace(grid=Grid(location.grid.scale, (top, left)))


def _pooled(first: int = 1, padded: bool = True, dilated: bool = False) -> Rule:
    """Return the rule for a pooling function that takes the window size as argument number `first`."""

    def rule(call: FunctionCall) -> Location | None:
        location = call.locations[0]
        if location.axes != (2, 3):
            return None
        kernel = call.pair(first, "kernel_size", 1)
        stride = call.pair(first + 1, "stride", kernel)
        padding = call.pair(first + 2, "padding", 0) if padded else (0, 0)
        dilation = call.pair(first + 3, "dilation", 1) if dilated else (1, 1)
        return location.move(call.result, location.grid.windows(kernel, stride, padding, dilation))

    return rule


def _interpolated(call: FunctionCall) -> Location | None:
    location, result = call.locations[0], call.result
    if location.axes != (2, 3):
        return None
    factors, mode = call.argument(2, "scale_factor"), call.argument(3, "mode", "nearest")
    align_corners = bool(call.argument(4, "align_corners", False))
    if align_corners or factors is None or call.argument(5, "recompute_scale_factor", False) or mode == "area":
        return location.stretch(result, align_corners)
    # The factor, not the ratio of the sizes, determines the positions.
    vertical, horizontal = factors if isinstance(factors, Sequence) else (factors, factors)
    centre = [(1 / factor - 1) / 2 for factor in (vertical, horizontal)]
    return location.move(result, location.grid.resample(centre, (1 / vertical, 1 / horizontal)))


def _transposed_convolution(call: FunctionCall) -> Location | None:
    location = call.locations[0]
    if location.axes != (2, 3) or call.sources[0] is not call.argument(0, "input"):
        return None
    kernel = call.argument(1, "weight").shape[2:]
    stride, padding, dilation = call.pair(3, "stride", 1), call.pair(4, "padding", 0), call.pair(7, "dilation", 1)
    first = [(p - d * (k - 1) / 2) / s for k, s, p, d in zip(kernel, stride, padding, dilation)]
    return location.move(call.result, location.grid.resample(first, [1 / s for s in stride]))


REGION_POOLINGS = ("roi_pool", "ps_roi_align", "ps_roi_pool")
"""Operations of torchvision with results that have no location in the image."""

RULES: dict[str, Rule] = {
    "avg_pool2d": _pooled(),
    "conv_transpose2d": _transposed_convolution,
    "interpolate": _interpolated,
    "lp_pool2d": _pooled(2, padded=False),
    "max_pool2d": _pooled(dilated=True),
    "max_pool2d_with_indices": _pooled(dilated=True),
    "pad": _padded,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    **dict.fromkeys(("grid_sample", "rot90"), _lost),
    **dict.fromkeys(("mT", "moveaxis", "movedim", "permute", "swapaxes", "swapdims", "transpose"), _permuted),
    **dict.fromkeys(("flatten", "reshape", "unflatten", "view", "view_as", "reshape_as"), _reshaped),
    **dict.fromkeys(("__getitem__", "index_select", "narrow"), _selected),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "dsplit", "hsplit", "vsplit"), _selected),
    **dict.fromkeys(("flip", "fliplr", "flipud", "repeat", "roll", "tile"), _selected),
}
"""Rules by the names of functions; every other function follows `_default_rule`."""


def _size(tensor: Tensor, axes: tuple[int, int]) -> tuple[int, int]:
    return tensor.shape[axes[0]], tensor.shape[axes[1]]


def _tensors(items: Iterable[Any]) -> Iterable[Tensor]:
    """Yield the tensors among the items and in lists among them."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(item)
