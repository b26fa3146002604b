"""Where the maps of a network lie in the image, followed through the functions that it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .moves import MOVES, Call, other_move, sliced
from .places import Grid, Place, extents


class Grids:
    """The grids of all maps [N, C, H, W] that were made of an image.

    Convolutions, pooling, padding, interpolation, slices, splits and joins move a grid as they say. Any other function
    leaves it where the size stays, or is taken to stretch the map over the same part of the image. Maps are followed
    through other orders of dimensions, and those that are reshaped are found again in a later one of their size, as
    after a shuffle of channels or in transformers.
    """

    def __init__(self, image: Tensor | None = None) -> None:
        self._known: Any = WeakTensorKeyDictionary()
        if image is not None:
            self._known[image] = Place(Grid(), extents(image, (2, 3)))

    def __getitem__(self, tensor: Tensor) -> Grid | None:
        """The grid of a map; None where the map was not made of the image, or regions of it were pooled."""
        place: Place | None = self._known.get(tensor)
        return place.grid if place is not None and place.axes == (2, 3) and tensor.ndim == 4 else None

    def convolved(
        self,
        source: Tensor,
        result: Tensor,
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Grid | None:
        """Note, and give, the grid of what a convolution made of a map."""
        grid = self[source]
        if grid is None:
            return None
        grid = grid.windows(kernel, stride, padding, dilation)
        self._known[result] = self._known[source].moved(result, grid)
        return grid

    def follow(
        self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], result: object
    ) -> None:
        """Note the grids of what `function` made of its arguments."""
        sources = [item for item in _flat((*args, *kwargs.values())) if item in self._known]
        results = [item for item in _flat([result]) if item.numel()]
        if not sources or not results:
            return
        axis = _split_axis(sources[0], results) if len(results) > 1 else None
        begin = 0
        for item in results:
            if axis is not None:
                place = sliced(self._known[sources[0]], item, {axis: (begin, 1)})
                begin += item.shape[axis]
            elif item in self._known:  # changed in place
                continue
            else:
                call = Call(function, args, kwargs, sources, [self._known[source] for source in sources], item)
                place = MOVES.get(getattr(function, "__name__", ""), other_move)(call)
            if place is not None:
                self._known[item] = place


def _flat(items: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among the items and in lists among them."""
    for item in items:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _flat(item)


def _split_axis(source: Tensor, parts: Sequence[Tensor]) -> int | None:
    """The dimension along which a tensor was split into parts; None if these are something else."""
    for axis in range(source.ndim):
        if any(part.ndim != source.ndim for part in parts):
            break
        whole = sum(part.shape[axis] for part in parts)
        shapes = [(*source.shape[:axis], part.shape[axis], *source.shape[axis + 1 :]) for part in parts]
        if whole == source.shape[axis] and all(part.shape == shape for part, shape in zip(parts, shapes)):
            return axis
    return None
