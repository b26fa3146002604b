"""Options of the figures of spatial support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import option


@dataclass(frozen=True, kw_only=True)
class SpatialSupportView:
    """Nodes of a figure of spatial support, and how to draw them.

    `layer`, `depth`, `bound` and `budget` are those of `dcnops.adapters.torch.spatial_support`.
    """

    figure: Literal[1, 2] = option(1, "figure of the paper: 1 shows pixels of a layer, 2 regions")
    node: tuple[tuple[float, float], ...] = option(
        (), "pixel of the image for figure 1; repeatable", metavar="X,Y", numbers=2
    )
    roi: tuple[tuple[float, float, float, float], ...] = option(
        (), "region of the image for figure 2; repeatable", metavar="X1,Y1,X2,Y2", numbers=4
    )
    part: Literal["features", "class"] = option(
        "features",
        "response of a region in figure 2: the features of the box head (the output of its second fully connected "
        "layer), as in the paper, or the score of a category; bins always show their effect on the score",
    )
    category: str | None = option(None, "category to explain in figure 2; default: the best one, or background")
    layer: str = option("backbone.body.layer4", "layer to take the pixels of figure 1 from")
    depth: int = option(3, "number of stacked layers to follow sampling points through", 1, 100)
    bound: float = option(0.1, "maximum relative error of the response to the saliency region", 0, 1)
    budget: int = option(4000, "masked images to try in the search for a saliency region", 1, 10**6)
