"""Where the pixels of feature maps lie in the image, followed through the functions that a network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["LOST", "Grid", "Grids"]

LOST = "cannot be located: it is no map [N, C, H, W] made of the image, or made in a way that cannot be followed"
ROUNDING = 1e-9  # pixels: what a position may be off after it has been to another grid


class Grid(NamedTuple):
    """The positions of a map's pixels: ``image = scale * map + shift``, vertical and horizontal.

    Attributes
    ----------
    scale : (float, float)
        Pixels of the image between neighbours of the map.
    shift : (float, float)
        The position of the map's first pixel, in pixels of the image; the centre of the image's first one is 0.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def to_image(self, positions: Tensor) -> Tensor:
        """Positions [..., 2] (y, x) of the map in the image."""
        return positions * positions.new_tensor(self.scale) + positions.new_tensor(self.shift)

    def moved(self, positions: Tensor, other: Grid) -> Tensor:
        """Positions [..., 2] (y, x) of this map in another one of the same image; whole ones stay whole."""
        if other == self:
            return positions
        found = other.from_image(self.to_image(positions))
        whole = found.round()
        return torch.where((found - whole).abs() < ROUNDING, whole, found)

    def from_image(self, positions: Tensor) -> Tensor:
        """Positions [..., 2] (y, x) of the image in the map."""
        return (positions - positions.new_tensor(self.shift)) / positions.new_tensor(self.scale)

    def windows(
        self, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> Grid:
        """The grid of the centres of windows that slide over this one; `padding` is that above and to the left."""
        centres = [d * (k - 1) / 2 - p for k, p, d in zip(kernel, padding, dilation)]
        return self._after(centres, stride)

    def stretched(self, before: Sequence[int], after: Sequence[int], align_corners: bool = False) -> Grid:
        """The grid of a map of the size `after` that covers what one of the size `before` covers."""
        if align_corners:
            return self._after((0, 0), [(m - 1) / max(n - 1, 1) or 1 for m, n in zip(before, after)])
        ratios = [m / n for m, n in zip(before, after)]
        return self._after([(ratio - 1) / 2 for ratio in ratios], ratios)

    def padded(self, padding: Sequence[int]) -> Grid:
        """The grid after rows above and columns to the left have been added."""
        return self._after([-side for side in padding], (1, 1))

    def _after(self, first: Sequence[float], step: Sequence[float]) -> Grid:
        """The grid whose first pixel lies at `first` of this one, and whose pixels are `step` of them apart."""
        (vertical, horizontal), (top, left) = self.scale, self.shift
        return Grid(
            (vertical * step[0], horizontal * step[1]), (top + vertical * first[0], left + horizontal * first[1])
        )


class Grids:
    """The grids of all maps [N, C, H, W] that were made of an image.

    Convolutions, pooling, padding, interpolation, slices and splits move a grid as they say. Any other function leaves
    it where the size stays, or is taken to stretch the map over the same part of the image. A map that is reshaped is
    found again in a later one of its size, as after a shuffle of channels or in transformers.
    """

    def __init__(self, image: Tensor | None = None) -> None:
        # Of every tensor: the grid of the last map before it, and that map's size.
        self._known: Any = WeakTensorKeyDictionary()
        self.set(image, Grid())

    def __getitem__(self, tensor: Tensor) -> Grid | None:
        """The grid of a map; None where the map was not made of the image, or regions of it were pooled."""
        grid, _ = self._known.get(tensor) or (None, ())
        return grid if tensor.ndim == 4 else None

    def follow(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """Note the grids of what `function` made of its arguments."""
        sources = [item for item in _flat((*args, *kwargs.values())) if item in self._known]
        if not sources:
            return
        name, arguments = getattr(function, "__name__", ""), _Arguments(args, kwargs)
        results = list(_flat([result]))
        if name in SPLITS and isinstance(result, (list, tuple)) and sources[0].ndim == 4:
            for part, moved in zip(results, _split(self._known[sources[0]][0], sources[0], results, arguments)):
                self.set(part, moved)
            return
        for item in results:
            if item.numel() and item not in self._known:
                self._follow(name, arguments, sources, item)

    def set(self, tensor: Tensor | None, grid: Grid | None) -> None:
        """Note the grid of a map that is known otherwise."""
        if tensor is not None and grid is not None:
            self._known[tensor] = grid, tensor.shape[-2:]

    def _follow(self, name: str, arguments: _Arguments, sources: Sequence[Tensor], result: Tensor) -> None:
        maps = [source for source in sources if source.ndim == 4]
        size = result.shape[-2:]
        if result.ndim != 4:
            grid, size = self._known[(maps or sources)[0]]
            if _holds(result.shape, size):
                self._known[result] = grid, size
        elif maps:
            source = next((item for item in maps if item.shape[-2:] == size), maps[0])
            grid, _ = self._known[source]
            if name in MOVES:
                grid = MOVES[name](grid, source, result, arguments)
            elif source.shape[-2:] != size:
                grid = grid.stretched(source.shape[-2:], size)
            self.set(result, grid)
        else:
            self.set(result, next((grid for grid, before in map(self._known.get, sources) if before == size), None))


class _Arguments:
    """The arguments of a function, by position or name."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def get(self, position: int, name: str, default: Any) -> Any:
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def pair(self, position: int, name: str, default: Any) -> tuple[int, int]:
        value = self.get(position, name, default)
        if value is None or (isinstance(value, Sequence) and not value):
            value = default
        if isinstance(value, int):
            return value, value
        return (value[0], value[-1])


def _flat(items: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among the items and in lists among them."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _flat(item)


def _holds(shape: Sequence[int], size: Sequence[int]) -> bool:
    """Whether a tensor that is no map can still have the pixels of one of a size, side by side or in one row."""
    height, width = size
    return height * width in shape or (height, width) in pairwise(shape)


def _split(grid: Grid, source: Tensor, parts: Sequence[Tensor], arguments: _Arguments) -> Iterable[Grid]:
    """The grids of the parts that a map was split into along one of its dimensions."""
    axis = arguments.get(2, "dim", 0) % 4
    begin = 0
    for part in parts:
        yield grid._after((begin if axis == 2 else 0, begin if axis == 3 else 0), (1, 1))
        begin += part.shape[axis]


def _slice(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    index = arguments.get(1, "index", ())
    items = list(index) if isinstance(index, tuple) else [index]
    rest = next((number for number, item in enumerate(items) if item is Ellipsis), len(items))
    items[rest : rest + 1] = [slice(None)] * (4 - len(items) + (rest < len(items)))
    if not all(isinstance(item, slice) for item in items):
        return grid if source.shape[2:] == result.shape[2:] else grid.stretched(source.shape[2:], result.shape[2:])
    first, _, step = zip(*(item.indices(size) for item, size in zip(items[2:], source.shape[2:])))
    return grid._after(first, step)


def _narrow(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    axis, begin = arguments.get(1, "dim", 0) % 4, int(arguments.get(2, "start", 0))
    begin %= source.shape[axis]
    return grid._after((begin if axis == 2 else 0, begin if axis == 3 else 0), (1, 1))


def _max_pool(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    kernel = arguments.pair(1, "kernel_size", 1)
    padding, dilation = arguments.pair(3, "padding", 0), arguments.pair(4, "dilation", 1)
    return grid.windows(kernel, arguments.pair(2, "stride", kernel), padding, dilation)


def _average_pool(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    kernel = arguments.pair(1, "kernel_size", 1)
    return grid.windows(kernel, arguments.pair(2, "stride", kernel), arguments.pair(3, "padding", 0), (1, 1))


def _interpolate(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    return grid.stretched(source.shape[-2:], result.shape[-2:], bool(arguments.get(4, "align_corners", False)))


def _pad(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    left, _, top, _ = (*arguments.get(1, "pad", ()), 0, 0, 0, 0)[:4]
    return grid.padded((top, left))


def _transposed_convolution(grid: Grid, source: Tensor, result: Tensor, arguments: _Arguments) -> Grid:
    weight = arguments.get(1, "weight", None)
    stride, padding = arguments.pair(3, "stride", 1), arguments.pair(4, "padding", 0)
    dilation = arguments.pair(7, "dilation", 1)
    first = [(p - d * (k - 1) / 2) / s for k, s, p, d in zip(weight.shape[2:], stride, padding, dilation)]
    return grid._after(first, [1 / s for s in stride])


MOVES: dict[str, Callable[[Grid, Tensor, Tensor, _Arguments], Grid]] = {
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _average_pool,
    "interpolate": _interpolate,
    "pad": _pad,
    "conv_transpose2d": _transposed_convolution,
    "__getitem__": _slice,
    "narrow": _narrow,
}

SPLITS = ("chunk", "split", "split_with_sizes", "tensor_split")
