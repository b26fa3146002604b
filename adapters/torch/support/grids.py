"""Where the pixels of feature maps lie in the image, followed through the functions that a network calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["Grid", "Grids"]


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

    Convolutions, pooling, padding and interpolation move a grid as they say. Any other function leaves it where the
    size stays, or is taken to stretch the map over the same part of the image.
    """

    def __init__(self, image: Tensor | None = None) -> None:
        self._known: Any = WeakTensorKeyDictionary()
        if image is not None:
            self._known[image] = Grid()

    def __getitem__(self, tensor: Tensor) -> Grid | None:
        """The grid of a map; None where the map was not made of the image, or regions of it were pooled."""
        grid: Grid | None = self._known.get(tensor)
        return grid

    def follow(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """Note the grid of what `function` made of its arguments."""
        if not isinstance(result, Tensor) or result.ndim != 4 or not result.numel():
            return
        sources = [item for item in _flat((*args, *kwargs.values())) if item.ndim == 4 and item in self._known]
        if not sources or result in self._known:
            return
        size = result.shape[-2:]
        source = next((item for item in sources if item.shape[-2:] == size), sources[0])
        grid: Grid = self._known[source]
        move = MOVES.get(getattr(function, "__name__", ""))
        if move is not None:
            moved = move(grid, source, result, _Arguments(args, kwargs))
        elif source.shape[-2:] == size:
            moved = grid
        else:
            moved = grid.stretched(source.shape[-2:], size)
        self._known[result] = moved

    def set(self, tensor: Tensor, grid: Grid | None) -> None:
        """Note the grid of a map that is known otherwise."""
        if grid is not None:
            self._known[tensor] = grid


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
    "avg_pool2d": _average_pool,
    "interpolate": _interpolate,
    "pad": _pad,
    "conv_transpose2d": _transposed_convolution,
}
