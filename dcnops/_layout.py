"""Layouts (axis orders) of images; after validation every array is an [N, C, H, W] view with arbitrary strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Layout:
    """Order of the four axes of images; a singleton per layout.

    Attributes
    ----------
    axes : tuple of int
        Positions of N, C, H and W in the layout.
    order : tuple of int
        Indices into (N, C, H, W), in the order of the layout.
    """

    axes: tuple[int, ...]
    order: tuple[int, ...]

    def sizes(self, shape: Sequence[_T]) -> tuple[_T, _T, _T, _T]:
        """Return (N, C, H, W) of a shape in this layout."""
        n, c, h, w = self.axes
        return shape[n], shape[c], shape[h], shape[w]

    def shape(self, *sizes: _T) -> tuple[_T, ...]:
        """Arrange the sizes N, C, H, W in the order of this layout."""
        return tuple([sizes[i] for i in self.order])

    def text(self, *sizes: str) -> str:
        """Format the result of `shape` for an error message."""
        return ", ".join(self.shape(*sizes))

    def to_nchw(self, array: Any) -> Any:
        """Return an [N, C, H, W] view of an array in this layout; None for None."""
        return array if array is None or self is NCHW else array.transpose(self.axes)

    def from_nchw(self, images: Any, contiguous: Callable[[Any], Any]) -> Any:
        """Return [N, C, H, W] images in this layout; `contiguous` makes a transposed view contiguous."""
        return images if images is None or self is NCHW else contiguous(images.transpose(self.order))


LAYOUTS = {name: Layout(tuple(map(name.index, "NCHW")), tuple(map("NCHW".index, name))) for name in ("NCHW", "NHWC")}
NCHW = LAYOUTS["NCHW"]
