"""Where the pixels of a feature map lie in the image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOST = "cannot be located: it is no map [N, C, H, W] made of the image, or was made in a way that cannot be followed"
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
        return self.after(centres, stride)

    def stretched(self, before: Sequence[int], after: Sequence[int], align_corners: bool = False) -> Grid:
        """The grid of a map of the size `after` that covers what one of the size `before` covers."""
        if align_corners:
            return self.after((0, 0), [(m - 1) / max(n - 1, 1) or 1 for m, n in zip(before, after)])
        ratios = [m / n for m, n in zip(before, after)]
        return self.after([(ratio - 1) / 2 for ratio in ratios], ratios)

    def after(self, first: Sequence[float], step: Sequence[float]) -> Grid:
        """The grid whose first pixel lies at `first` of this one, and whose pixels are `step` of them apart."""
        (vertical, horizontal), (top, left) = self.scale, self.shift
        return Grid(
            (vertical * step[0], horizontal * step[1]), (top + vertical * first[0], left + horizontal * first[1])
        )


class Place(NamedTuple):
    """Where a tensor that was made of a map lies.

    Attributes
    ----------
    grid : Grid
    size : (H, W)
        Of the map.
    axes : (int, int), or None
        Which of the tensor's dimensions are the map's rows and columns; None where they are one dimension, as tokens.
    stretches : int
        How often its map, or one before it, was stretched to another size, not moved exactly.
    """

    grid: Grid
    size: tuple[int, int]
    axes: tuple[int, int] | None = (2, 3)
    stretches: int = 0

    def moved(self, result: Tensor, grid: Grid) -> Place:
        """That of a result whose rows and columns are the same dimensions."""
        assert self.axes is not None
        return self._replace(grid=grid, size=extents(result, self.axes))


def extents(tensor: Tensor, axes: tuple[int, int]) -> tuple[int, int]:
    """The sizes of two dimensions."""
    return tensor.shape[axes[0]], tensor.shape[axes[1]]
