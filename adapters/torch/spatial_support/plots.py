"""Pictures of spatial support, with matplotlib (``pip install dcnops[plots]``): single views, and whole figures.

Functions that begin with ``draw`` add to the axes that they are given; the others make a figure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from torch import Tensor, nn

from dcnops._errors import ArgumentError, ShapeError

from .locations import Bins, SamplingPoints, effective_bin_locations, effective_sampling_locations
from .nodes import LayerNode, Node, Respond, RoINode, as_node
from .saliency import SaliencyRegion, effective_receptive_field, error_bounded_saliency_region
from .statistics import LayerStatistics

Picture = NDArray[np.floating[Any]]

NODE = "#39ff6a"  # of the node's mark, seen on the colour map and on photographs
STRENGTHS = "inferno"
BLUE, ORANGE = "#0072b2", "#e69f00"
QUANTILE = 0.99  # of the strengths: stronger ones have the colour of this one


def draw_points(axes: Axes, picture: Tensor, points: SamplingPoints, position: Sequence[float] | None = None) -> None:
    """Sampling points over the image, the strong ones bright, large and on top.

    Parameters
    ----------
    axes : matplotlib.axes.Axes
    picture : Tensor [3, H, W] or [1, H, W]
        The image, 0 to 255 if uint8, else 0 to 1.
    points : SamplingPoints
        From `sampling_locations` or `effective_sampling_locations`.
    position : (y, x), optional
        Of the node, which is then marked.

    Raises
    ------
    ShapeError
        `picture` is none.
    """
    shown = _show(axes, picture, dim=0.45)
    strength = _relative(points.strength)
    order = np.argsort(strength)
    sides = max(shown.shape) / 55 * (0.4 + 0.6 * strength[order])
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
    _mark(axes, position, shown)


def draw_bins(axes: Axes, picture: Tensor, bins: Bins, box: Sequence[float] | None = None) -> None:
    """The bins of a region as rectangles over the image, coloured by their strength.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    bins : Bins
        From `effective_bin_locations`.
    box : (x1, y1, x2, y2), optional
        The region, which is then outlined.

    Raises
    ------
    ShapeError
        `picture` is none.
    """
    _show(axes, picture, dim=0.45)
    strength = _relative(bins.strength).reshape(-1)
    colours = _colours(strength)
    for index in np.argsort(strength):
        x1, y1, x2, y2 = bins.boxes.reshape(-1, 4)[index].tolist()
        colour = colours[index]
        face = (*colour[:3], 0.15 + 0.45 * strength[index])
        axes.add_patch(
            Rectangle(
                (x1 - 0.5, y1 - 0.5),
                x2 - x1,
                y2 - y1,
                facecolor=face,
                edgecolor=colour,
                linewidth=0.6,
            )
        )
    _outline(axes, box)


def draw_field(axes: Axes, picture: Tensor, field: Tensor, place: Sequence[float] | None = None) -> None:
    """A receptive field as a heat map over the image in grey.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    field : Tensor [H, W]
        From `effective_receptive_field`. The square root of it is shown, its smallest values transparent.
    place : (y, x) or (x1, y1, x2, y2), optional
        Of the node, a pixel or a region, which is then marked.

    Raises
    ------
    ShapeError
        `picture` is none.
    """
    shown = _show(axes, picture, dim=0.5, grey=True)
    heat = np.sqrt(_relative(field))
    colours = _colours(heat)
    colours[..., 3] = np.clip(heat * 1.6, 0, 0.95)
    axes.imshow(colours, interpolation="bilinear")
    _mark_node(axes, place, shown)


def draw_region(axes: Axes, picture: Tensor, region: SaliencyRegion, place: Sequence[float] | None = None) -> None:
    """The saliency region cut out of the image.

    Parameters
    ----------
    axes, picture : as in `draw_points`
    region : SaliencyRegion
        From `error_bounded_saliency_region`.
    place : (y, x) or (x1, y1, x2, y2), optional
        Of the node, a pixel or a region, which is then marked.

    Raises
    ------
    ShapeError
        `picture` is none.
    """
    shown = _pixels(picture)
    mask = region.mask.cpu().numpy()
    grey = np.full_like(shown, 0.93)
    axes.imshow(np.where(mask[..., None], shown, 0.9 * grey + 0.1 * shown), interpolation="nearest")
    _frame(axes, shown)
    if mask.any() and not mask.all():
        # Contours run between pixels; a border lets those at the edge of the image close.
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
        axes.contour(columns, rows, padded, levels=[0.5], colors=BLUE, linewidths=1.0)
    _mark_node(axes, place, shown)


def plot_statistics(statistics: Mapping[str, LayerStatistics]) -> Figure:
    """Histograms of the lengths of the offsets and of the masks, a row for each layer.

    Parameters
    ----------
    statistics : mapping of str to LayerStatistics
        From `offset_statistics` or an `OffsetObserver`.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ArgumentError
        No layer is deformable.

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
    shared = max(
        (row.lengths.quantile(0.995).item() for row in rows if row.unit == "pixels" and len(row.offsets)), default=0
    )
    top = max((math.ceil(row.masks.max()) for row in rows if row.masks is not None and len(row.masks)), default=1)
    for (left, right), row in zip(panels, rows):
        regions = row.unit == "regions"
        lengths = row.lengths.nan_to_num(posinf=0).numpy()
        limit = np.quantile(lengths, 0.995) if regions and len(lengths) else shared
        _histogram(left, lengths, (0.0, float(limit) or 1.0), BLUE)
        left.set_ylabel(_short(row.name), rotation=0, ha="right", va="center", fontsize=7)
        left.text(
            0.99,
            0.93,
            f"mean {lengths.mean() if len(lengths) else 0:.2f} {'of the region' if regions else 'px'}, "
            f"{row.outside:.1%} off the map",
            transform=left.transAxes,
            ha="right",
            va="top",
            fontsize=7,
        )
        if row.masks is None:
            right.axis("off")
            continue
        _histogram(right, row.masks.numpy(), (0.0, top), ORANGE)
        right.text(
            0.99, 0.93, f"mean {row.masks.mean():.2f}", transform=right.transAxes, ha="right", va="top", fontsize=7
        )
    panels[0, 0].set_title("length of the offsets", fontsize=9)
    panels[0, 1].set_title("masks", fontsize=9)
    return figure


def plot_support(
    networks: Mapping[str, nn.Module],
    image: Tensor,
    nodes: Mapping[str, Node],
    picture: Tensor,
    *,
    depth: int = 3,
    bound: float = 0.1,
    budget: int = 4000,
    batch_size: int = 16,
    progress: bool | None = None,
) -> Figure:
    """Nodes side by side, three views of each below one another, for every network: figures 1 and 2 of the paper.

    The views of a pixel of a map are its effective sampling points, receptive field and saliency region (figure 1),
    those of a region its effective bins, receptive field and saliency region (figure 2).

    Parameters
    ----------
    networks : mapping of title to torch.nn.Module
    image : Tensor [C, H, W] or [1, C, H, W]
        The input of the networks, normalised.
    nodes : mapping of title to LayerNode or RoINode, or their plain tuples
    picture : Tensor [3, H, W] or [1, H, W]
        The image as it is shown, of the same size.
    depth : int
        As in `effective_sampling_locations`.
    bound, budget, batch_size, progress
        As in `error_bounded_saliency_region`.

    Returns
    -------
    matplotlib.figure.Figure
        Rows of views, columns of nodes, network by network.

    Raises
    ------
    ArgumentError, ShapeError
        As in the functions of the views.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack
    >>> from dcnops.adapters.torch.spatial_support.plots import plot_support
    >>> networks = {"regular": torch.nn.Conv2d(3, 8, 3, padding=1), "v1": DeformConv2dPack(3, 8, 3, padding=1)}
    >>> image = torch.rand(3, 16, 16)
    >>> figure = plot_support(networks, image, {"middle": ("", 8, 8)}, image, budget=200)
    >>> len(figure.axes)
    6
    """
    resolved = {title: as_node(node) for title, node in nodes.items()}
    for title, node in resolved.items():
        if not isinstance(node, (LayerNode, RoINode)):
            raise ArgumentError(f"nodes must be (layer, y, x) or (box, ...), {title!r} is {node!r}")
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
    for number, (part, (title, network)) in enumerate(zip(parts, networks.items())):
        part.suptitle(title, fontsize=11, fontweight="bold")
        panels = part.subplots(3, len(nodes), squeeze=False)
        for column, (name, node) in enumerate(resolved.items()):
            labels = _draw_views(
                panels[:, column], network, image, node, picture, depth, bound, budget, batch_size, progress
            )
            panels[0, column].set_title(name, fontsize=9)
            for panel, label in zip(panels[:, column], labels):
                panel.set_xlabel(label.partition("|")[2], fontsize=7)
                if number == 0 and column == 0:
                    panel.set_ylabel(label.partition("|")[0], fontsize=8)
    return figure


def _draw_views(
    panels: Sequence[Axes],
    network: nn.Module,
    image: Tensor,
    node: Respond,
    picture: Tensor,
    depth: int,
    bound: float,
    budget: int,
    batch_size: int,
    progress: bool | None,
) -> list[str]:
    """The three views of a node; what is to be written beside and under each."""
    if isinstance(node, RoINode):
        place: Sequence[float] = node.box
        draw_bins(panels[0], picture, effective_bin_locations(network, image, node), place)
        first = "effective bins|"
    else:
        assert isinstance(node, LayerNode)
        place = node.position(network, image)
        points = effective_sampling_locations(network, image, node, depth=depth)
        draw_points(panels[0], picture, points, place)
        first = f"effective sampling points|{len(points.strength)} points"
    draw_field(panels[1], picture, effective_receptive_field(network, image, node), place)
    region = error_bounded_saliency_region(
        network, image, node, bound=bound, budget=budget, batch_size=batch_size, progress=progress
    )
    draw_region(panels[2], picture, region, place)
    share = region.areas[-1] / region.areas[0]
    unfinished = "" if region.finished else ", budget used up"
    return [
        first,
        "effective receptive field|",
        f"saliency region, error ≤ {bound:.0%}|{share:.1%} of the image{unfinished}",
    ]


def _pixels(picture: Tensor) -> Picture:
    """The picture [H, W, 3], 0 to 1."""
    if not isinstance(picture, Tensor) or picture.ndim != 3 or picture.shape[0] not in (1, 3):
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        raise ShapeError(f"picture must be [3, H, W] or [1, H, W], got {shape}")
    values = picture.detach().cpu()
    values = values.float() / 255 if values.dtype == torch.uint8 else values.float().clamp(0, 1)
    return np.ascontiguousarray(values.expand(3, -1, -1).permute(1, 2, 0).numpy())


def _show(axes: Axes, picture: Tensor, dim: float, grey: bool = False) -> Picture:
    """Show a picture darkened, so that bright colours stand out."""
    pixels = _pixels(picture)
    shown = pixels.mean(-1, keepdims=True).repeat(3, -1) if grey else pixels
    axes.imshow(shown * (1 - dim), interpolation="nearest")
    _frame(axes, pixels)
    return pixels


def _frame(axes: Axes, pixels: Picture) -> None:
    height, width = pixels.shape[:2]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _relative(values: Tensor) -> Picture:
    """Values in 0..1, those of the strongest per cent being 1."""
    array = np.nan_to_num(values.detach().double().cpu().numpy(), posinf=0)
    top = float(np.quantile(array[array > 0], QUANTILE)) if (array > 0).any() else 1.0
    return np.asarray(np.clip(array / top, 0, 1))


def _colours(strength: Picture) -> Picture:
    """RGBA for strengths in 0..1."""
    return np.asarray(colormaps[STRENGTHS](0.2 + 0.8 * strength))


def _mark_node(axes: Axes, place: Sequence[float] | None, shown: Picture) -> None:
    if place is not None and len(place) == 4:
        _outline(axes, place)
    else:
        _mark(axes, place, shown)


def _mark(axes: Axes, position: Sequence[float] | None, shown: Picture) -> None:
    """A cross with a dark rim, in pixels of the image, so that it does not depend on the size of the axes."""
    if position is None:
        return
    y, x = position
    side = max(shown.shape) / 22
    for colour, long, thick in (("black", 1.25 * side, 0.42 * side), (NODE, side, 0.2 * side)):
        for wide, high in ((long, thick), (thick, long)):
            axes.add_patch(Rectangle((x - wide / 2, y - high / 2), wide, high, color=colour, linewidth=0))


def _outline(axes: Axes, box: Sequence[float] | None) -> None:
    if box is not None:
        x1, y1, x2, y2 = box
        corner = (x1 - 0.5, y1 - 0.5)
        axes.add_patch(Rectangle(corner, x2 - x1, y2 - y1, fill=False, edgecolor=NODE, linewidth=1.4))


def _histogram(axes: Axes, values: Any, limits: tuple[float, float], colour: str) -> None:
    axes.hist(np.clip(values, *limits), bins=50, range=limits, color=colour)
    axes.set_xlim(*limits)
    axes.set_yticks([])
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str) -> str:
    """The last parts of a long name."""
    parts = name.split(".")
    while len(parts) > 1 and len(".".join(parts)) > 24:
        del parts[0]
    return ".".join(parts)
