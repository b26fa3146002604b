"""Plots of spatial support with matplotlib (``pip install dcnops[plots]``).

The ``draw_...`` functions draw on given axes, the ``plot_...`` functions return a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dcnops._errors import ArgumentError, ShapeError

from ... import name_extra
from .locations import Bins, SamplingPoints, effective_bin_locations, effective_sampling_locations
from .nodes import LayerNode, Node, RoINode, as_node
from .saliency import SaliencyRegion, effective_receptive_field, error_bounded_saliency_region
from .statistics import LayerStatistics

with name_extra("plots", "matplotlib"):
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

Picture = NDArray[np.floating[Any]]

NODE_COLOUR = "#39ff6a"  # colour of the node's mark, visible on the colour map and on photographs
COLOUR_MAP = "inferno"
BLUE, ORANGE = "#0072b2", "#e69f00"
QUANTILE = 0.99  # quantile of the strengths that has the brightest colour


def draw_points(axes: Axes, picture: Tensor, points: SamplingPoints, position: Sequence[float] | None = None) -> None:
    """Draw sampling points on the image, with strong ones bright, large and on top.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    picture : Tensor [3, H, W] or [1, H, W]
        The image, with values from 0 to 255 if uint8, otherwise from 0 to 1.
    points : SamplingPoints
        Result of `sampling_locations` or `effective_sampling_locations`.
    position : (y, x), optional
        Position of the node to mark.

    Raises
    ------
    ShapeError
        `picture` is not [3, H, W] or [1, H, W].
    """
    pixels = _show(axes, picture, dim=0.45)
    strength = _relative(points.strength)
    order = np.argsort(strength)
    sides = max(pixels.shape) / 55 * (0.4 + 0.6 * strength[order])
    dots = EllipseCollection(
        sides,
        sides,
        np.zeros_like(sides),
        units="xy",
        offsets=points.positions.cpu().numpy()[order][:, ::-1],
        offset_transform=axes.transData,
        facecolors=_colours(strength[order]),
        linewidths=0,
    )
    axes.add_collection(dots, autolim=False)
    _mark(axes, position, pixels)


def draw_bins(axes: Axes, picture: Tensor, bins: Bins, box: Sequence[float] | None = None) -> None:
    """Draw the bins of a region on the image as rectangles coloured by strength.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    bins : Bins
        Result of `effective_bin_locations`.
    box : (x1, y1, x2, y2), optional
        Region to mark.
    """
    pixels = _show(axes, picture, dim=0.45)
    strength = _relative(bins.strength).reshape(-1)
    colours = _colours(strength)
    for index in np.argsort(strength):
        x1, y1, x2, y2 = bins.boxes.reshape(-1, 4)[index].tolist()
        face = (*colours[index][:3], 0.15 + 0.45 * strength[index])
        style = {"facecolor": face, "edgecolor": colours[index], "linewidth": 0.6}
        axes.add_patch(Rectangle((x1 - 0.5, y1 - 0.5), x2 - x1, y2 - y1, **style))
    _mark(axes, box, pixels)


def draw_field(axes: Axes, picture: Tensor, field: Tensor, place: Sequence[float] | None = None) -> None:
    """Draw a receptive field as a heat map on the grey image.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    field : Tensor [H, W]
        Result of `effective_receptive_field`. The heat map shows its square root; small values are transparent.
    place : (y, x) or (x1, y1, x2, y2), optional
        Pixel or region to mark.
    """
    pixels = _show(axes, picture, dim=0.5, grey=True)
    heat = np.sqrt(_relative(field))
    colours = _colours(heat)
    colours[..., 3] = np.clip(heat * 1.6, 0, 0.95)
    axes.imshow(colours, interpolation="bilinear")
    _mark(axes, place, pixels)


def draw_region(axes: Axes, picture: Tensor, region: SaliencyRegion, place: Sequence[float] | None = None) -> None:
    """Draw the image with everything outside a saliency region faded.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    region : SaliencyRegion
        Result of `error_bounded_saliency_region`.
    place : (y, x) or (x1, y1, x2, y2), optional
        Pixel or region to mark.
    """
    pixels = _pixels(picture)
    mask = region.mask.cpu().numpy()
    faded = 0.9 * 0.93 + 0.1 * pixels
    axes.imshow(np.where(mask[..., None], pixels, faded), interpolation="nearest")
    _frame(axes, pixels)
    if mask.any() and not mask.all():
        # Contours run between pixels; the padding closes those at the edge of the image.
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
        axes.contour(columns, rows, padded, levels=[0.5], colors=BLUE, linewidths=1.0)
    _mark(axes, place, pixels)


def plot_statistics(statistics: Mapping[str, LayerStatistics]) -> Figure:
    """Plot histograms of the lengths of the offsets and of the masks, with one row for each layer.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        Result of `offset_statistics` or an `OffsetObserver`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ArgumentError
        `statistics` is empty.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support import offset_statistics
    >>> from dcnops.adapters.torch.spatial_support.plots import plot_statistics
    >>> layer = ModulatedDeformConv2dPack(3, 8, 3, padding=1)
    >>> figure = plot_statistics(offset_statistics(layer, torch.rand(3, 8, 8)))
    >>> len(figure.axes)
    2
    """
    if not statistics:
        raise ArgumentError("statistics must be of a deformable layer, there is none")
    rows = list(statistics.values())
    figure = Figure(figsize=(9, 0.75 * len(rows) + 1.0), dpi=130, layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    in_pixels = [row.lengths.quantile(0.995).item() for row in rows if row.unit == "pixels" and len(row.offsets)]
    shared_limit = max(in_pixels, default=0)
    top = max((math.ceil(row.masks.max()) for row in rows if row.masks is not None and len(row.masks)), default=1)
    for (left, right), row in zip(panels, rows):
        regions = row.unit == "regions"
        lengths = row.lengths.nan_to_num(posinf=0).numpy()
        limit = np.quantile(lengths, 0.995) if regions and len(lengths) else shared_limit
        mean = f"mean {lengths.mean() if len(lengths) else 0:.2f} {'of the region' if regions else 'px'}"
        _histogram(left, lengths, float(limit) or 1.0, BLUE, f"{mean}, {row.outside:.1%} off the map")
        left.set_ylabel(_title(_shorten(row.name)), rotation=0, ha="right", va="center", fontsize=7, parse_math=False)
        if row.masks is None:
            right.axis("off")
        else:
            _histogram(right, row.masks.numpy(), top, ORANGE, f"mean {row.masks.mean():.2f}")
    panels[0, 0].set_title("length of the offsets", fontsize=9)
    panels[0, 1].set_title("masks", fontsize=9)
    return figure


def plot_spatial_support(
    networks: Mapping[str, nn.Module],
    image: Tensor,
    nodes: Mapping[str, Node],
    picture: Tensor,
    *,
    bin_nodes: Mapping[str, Node] | None = None,
    depth: int = 3,
    bound: float = 0.1,
    budget: int = 4000,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Figure:
    """Plot three views of each node for every network, as in figures 1 and 2 of the paper.

    For a pixel of a map, the views are the effective sampling points, the receptive field and the saliency region
    (figure 1). For a region, effective bins replace the sampling points (figure 2).

    Parameters
    ----------
    networks : mapping of title to torch.nn.Module
    image : Tensor [C, H, W] or [1, C, H, W]
        Normalised input of the networks.
    nodes : mapping of title to LayerNode or RoINode, or their plain tuples
    picture : Tensor [3, H, W] or [1, H, W]
        The image for display, of the same size.
    bin_nodes : mapping of title to RoINode, optional
        Nodes of the effective bins, if they differ from `nodes`. The paper's figure 2 shows the effect of the bins on
        the classification, and the other views of the features.
    depth : int
        See `effective_sampling_locations`.
    bound, budget, batch_size, progress
        See `error_bounded_saliency_region`.

    Returns
    -------
    matplotlib.figure.Figure
        One column for each node, grouped by network, with the three views below one another.

    Raises
    ------
    ArgumentError, ShapeError
        See the functions that compute the views.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support.plots import plot_spatial_support
    >>> networks = {"regular": torch.nn.Conv2d(3, 8, 3, padding=1), "v1": DeformConv2dPack(3, 8, 3, padding=1)}
    >>> image = torch.rand(3, 16, 16)
    >>> figure = plot_spatial_support(networks, image, {"middle": ("", 8, 8)}, image, budget=200)
    >>> len(figure.axes)
    6
    """
    resolved = _resolve(nodes)
    of_bins = resolved | _resolve(bin_nodes or {})
    if not networks or not nodes:
        raise ArgumentError(f"networks and nodes must not be empty, got {len(networks)} and {len(nodes)}")
    if tuple(picture.shape[-2:]) != tuple(image.shape[-2:]):
        raise ShapeError(
            f"picture must be of the image's size {tuple(image.shape[-2:])}, got {tuple(picture.shape[-2:])}"
        )
    height, width = picture.shape[-2:]
    columns = len(networks) * len(nodes)
    side = 2.1
    figure = Figure(figsize=(side * columns + 0.3, 3 * side * height / width + 0.7), dpi=150, layout="constrained")
    parts = figure.subfigures(1, len(networks), wspace=0.02, squeeze=False)[0]
    search = {"bound": bound, "budget": budget, "batch_size": batch_size, "progress": progress}
    for number, (part, (title, network)) in enumerate(zip(parts, networks.items())):
        part.suptitle(_title(title), fontsize=11, fontweight="bold", parse_math=False)
        panels = part.subplots(3, len(nodes), squeeze=False)
        for column, (name, node) in enumerate(resolved.items()):
            labels = _draw_views(panels[:, column], network, image, node, of_bins[name], picture, depth, search)
            panels[0, column].set_title(_title(name), fontsize=9, parse_math=False)
            for panel, (view, result) in zip(panels[:, column], labels):
                panel.set_xlabel(result, fontsize=7)
                if number == 0 and column == 0:
                    panel.set_ylabel(view, fontsize=8)
    return figure


def _resolve(nodes: Mapping[str, Node]) -> dict[str, LayerNode | RoINode]:
    resolved: dict[str, LayerNode | RoINode] = {}
    for title, given in nodes.items():
        node = as_node(given)
        if not isinstance(node, (LayerNode, RoINode)):
            raise ArgumentError(f"nodes must be (layer, y, x) or (box, ...), {title!r} is {node!r}")
        resolved[title] = node
    return resolved


def _draw_views(
    panels: Sequence[Axes],
    network: nn.Module,
    image: Tensor,
    node: LayerNode | RoINode,
    node_of_bins: LayerNode | RoINode,
    picture: Tensor,
    depth: int,
    search: Mapping[str, Any],
) -> list[tuple[str, str]]:
    """Draw the three views of a node and return the name and result of each, for the labels of the axes."""
    if isinstance(node, RoINode):
        place: Sequence[float] = node.box
        draw_bins(panels[0], picture, effective_bin_locations(network, image, node_of_bins), place)
        first = "effective bins", ""
    else:
        place = node.position(network, image)
        points = effective_sampling_locations(network, image, node, depth=depth)
        draw_points(panels[0], picture, points, place)
        first = "effective sampling points", f"{len(points.strength)} points"
    draw_field(panels[1], picture, effective_receptive_field(network, image, node), place)
    region = error_bounded_saliency_region(network, image, node, **search)
    draw_region(panels[2], picture, region, place)
    unfinished = "" if region.finished else ", budget used up"
    size = f"{region.areas[-1] / region.areas[0]:.1%} of the image{unfinished}"
    return [first, ("effective receptive field", ""), (f"saliency region, error ≤ {search['bound']:.0%}", size)]


def _pixels(picture: Tensor) -> Picture:
    """Convert a picture to [H, W, 3] with values from 0 to 1."""
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ShapeError(f"picture must be [3, H, W] or [1, H, W], got {shape}")
    values = picture.detach().cpu()
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float().clamp(0, 1)
    return np.ascontiguousarray(values.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _show(axes: Axes, picture: Tensor, dim: float, grey: bool = False) -> Picture:
    """Show a picture darkened, so that bright colours stand out, and return its pixels."""
    pixels = _pixels(picture)
    shown = pixels.mean(-1, keepdims=True).repeat(3, -1) if grey else pixels
    axes.imshow(shown * (1 - dim), interpolation="nearest")
    _frame(axes, pixels)
    return pixels


def _frame(axes: Axes, pixels: Picture) -> None:
    height, width = pixels.shape[:2]
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _relative(values: Tensor) -> Picture:
    """Scale values to 0..1; the strongest per cent is clipped to 1."""
    array = np.nan_to_num(values.detach().double().cpu().numpy(), posinf=0)
    top = float(np.quantile(array[array > 0], QUANTILE)) if (array > 0).any() else 1.0
    return np.asarray(np.clip(array / top, 0, 1))


def _colours(strength: Picture) -> Picture:
    """Return RGBA colours for strengths in 0..1."""
    return np.asarray(colormaps[COLOUR_MAP](0.2 + 0.8 * strength))


def _mark(axes: Axes, place: Sequence[float] | None, pixels: Picture) -> None:
    """Mark a position (y, x) by a cross with a dark rim, or a region (x1, y1, x2, y2) by its outline."""
    if place is None:
        return
    if len(place) == 4:
        x1, y1, x2, y2 = place
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=NODE_COLOUR, linewidth=1.4))
        return
    y, x = place
    side = max(pixels.shape) / 22  # in pixels of the image, so that it does not depend on the size of the axes
    for colour, long, thick in (("black", 1.25 * side, 0.42 * side), (NODE_COLOUR, side, 0.2 * side)):
        for wide, high in ((long, thick), (thick, long)):
            axes.add_patch(Rectangle((x - wide / 2, y - high / 2), wide, high, color=colour, linewidth=0))


def _histogram(axes: Axes, values: Any, limit: float, colour: str, text: str) -> None:
    axes.hist(np.clip(values, 0, limit), bins=50, range=(0, limit), color=colour)
    axes.set(xlim=(0, limit), yticks=[])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.text(0.99, 0.93, text, transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _title(text: str) -> str:
    """Escape the characters of a title that matplotlib cannot draw, except for line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _shorten(name: str) -> str:
    """Return the last parts of a long name."""
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > 24:
        del parts[0]
    return ".".join(parts)
