"""The order of the axes of images. Behind the checks everything is [N, C, H, W], of whatever strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Layout:
    """An order of four axes; there is one object for each.

    Attributes
    ----------
    axes : tuple of int
        Where N, C, H and W stand.
    order : tuple of int
        Which of N, C, H and W stands first, second, third and fourth.
    """

    axes: tuple[int, ...]
    order: tuple[int, ...]

    def sizes(self, shape: Sequence[_T]) -> tuple[_T, _T, _T, _T]:
        """(N, C, H, W) of a shape in this order."""
        n, c, h, w = self.axes
        return shape[n], shape[c], shape[h], shape[w]

    def shape(self, *sizes: _T) -> tuple[_T, ...]:
        """The shape in this order of (N, C, H, W)."""
        return tuple([sizes[i] for i in self.order])

    def text(self, *sizes: str) -> str:
        """The same for a message."""
        return ", ".join(self.shape(*sizes))

    def images(self, array: Any) -> Any:
        """An array in this order as [N, C, H, W], a view; None for None."""
        return array if array is None or self is NCHW else array.transpose(self.axes)

    def array(self, images: Any, contiguous: Callable[[Any], Any]) -> Any:
        """Images [N, C, H, W] in this order; if it is another one, as a `contiguous` array."""
        return images if images is None or self is NCHW else contiguous(images.transpose(self.order))


LAYOUTS = {name: Layout(tuple(map(name.index, "NCHW")), tuple(map("NCHW".index, name))) for name in ("NCHW", "NHWC")}
NCHW = LAYOUTS["NCHW"]
