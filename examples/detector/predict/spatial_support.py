"""Spatial support of trained detectors: figures 1 and 2 of the paper, and histograms of offsets and masks."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcnops import ArgumentError
from dcnops.adapters.torch.spatial_support import LayerNode, RoINode, offset_statistics

from ..data import Category, check_categories, pad_elongated, read_image
from ..errors import UserError, cannot_write
from ..model import load_detector
from ..spatial_support_view import SpatialSupportView
from .inference import evaluating, infer
from .prediction import LARGEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THRESHOLD = 0.3  # minimum score of a detection that becomes a node
GRID = 24  # candidate points along a side in the search for background

BACKGROUND = "background"

Box = Sequence[float]


class _PreparedImage(NamedTuple):
    network: Tensor  # [3, H, W], resized, normalised and padded for the network
    picture: Tensor  # [3, H, W] in 0..1, with white padding
    scale: tuple[float, float]  # vertical and horizontal size of a pixel of the image file


def draw_checkpoints(
    checkpoints: Sequence[Path],
    image: Path,
    out: Path,
    device: torch.device,
    view: SpatialSupportView,
    *,
    assignments: Sequence[str] = (),
    categories: Sequence[Category] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[Path]:
    """Draw a figure for an image and, for each network with deformable layers, the histograms; return the files.

    The checkpoints must hold networks for the same categories. Each network gets a part of the figure. See
    `load_detector` for `assignments`, `categories` and `report`.
    """
    from dcnops.adapters.torch.spatial_support.plots import plot_statistics

    networks: dict[str, GeneralizedRCNN] = {}
    common: list[Category] = []
    for path in checkpoints:
        network, config, found = load_detector(path, device, assignments, categories=categories, report=report)
        if common:
            check_categories(common, found, str(path))
        common = found
        title = config.network.title
        networks[title if title not in networks else f"{title} ({path.parent.name or len(networks)})"] = network
    if len(networks) < len(checkpoints):
        raise UserError(
            f"--checkpoint: networks with the same preset must lie in different folders, got {list(checkpoints)}"
        )
    pixels = read_image(image, LARGEST)[0].to(device)
    try:
        names = [item.name for item in common]
        figures = {f"{image.stem}-figure{view.figure}.png": draw_spatial_support(networks, pixels, names, view)}
        for title, network in networks.items():
            if statistics := offset_statistics(network, pixels):
                figures[f"{image.stem}-offsets-{title}.png"] = plot_statistics(statistics)
    except ArgumentError as error:
        raise UserError(str(error)) from None
    for name, figure in figures.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            figure.savefig(out / name)
        except OSError as error:
            raise cannot_write(out / name, error) from None
    return [out / name for name in figures]


def draw_spatial_support(
    networks: dict[str, GeneralizedRCNN], image: Tensor, names: Sequence[str], view: SpatialSupportView
) -> Figure:
    """Draw a figure for an image [3, H, W] in 0..1, given networks by title and the names of their categories."""
    from dcnops.adapters.torch.spatial_support.plots import plot_spatial_support

    inputs = [_prepare(network, image) for network in networks.values()]
    if any(item.network.shape != inputs[0].network.shape for item in inputs):
        shapes = [tuple(item.network.shape[1:]) for item in inputs]
        raise UserError(f"the networks must take images of the same size, got {shapes}: set network.min_size")
    prepared, last = inputs[-1], list(networks.values())[-1]
    if view.category is not None and view.category not in names:
        raise UserError(f"--category must be one of {', '.join(names)}, got {view.category!r}")
    if view.node or view.roi:
        points, boxes = list(view.node), list[Box](view.roi)
        titles = [f"x {x:g}, y {y:g}" for x, y in points] if view.figure == 1 else [""] * len(boxes)
    else:
        points, boxes, titles = _choose_nodes(last, image)
    nodes: dict[str, LayerNode | RoINode] = {}
    scores: dict[str, RoINode] = {}
    if view.figure == 1:
        for (x, y), title in zip(points, titles):
            if not (0 <= x < image.shape[2] and 0 <= y < image.shape[1]):
                size = f"{image.shape[2]}x{image.shape[1]}"
                raise UserError(f"--node must be in the image of {size} pixels, got {x:g},{y:g}")
            row, column = (max((value + 0.5) * scale - 0.5, 0) for value, scale in zip((y, x), prepared.scale))
            nodes[_unique(title, nodes)] = LayerNode.at(last, prepared.network, view.layer, row, column)
    else:
        for box, title in zip(boxes, titles):
            name, score = _region_score(last, prepared, box, title, names, view.category)
            name = _unique(name, nodes)
            scores[name] = score
            nodes[name] = RoINode(score.box, part="features") if view.part == "features" else score
    if not nodes:
        raise UserError("figure 1 is of pixels (--node), figure 2 of regions (--roi)")
    return plot_spatial_support(
        networks,
        prepared.network,
        nodes,
        prepared.picture,
        bin_nodes=scores,
        depth=view.depth,
        bound=view.bound,
        budget=view.budget,
    )


def _region_score(
    network: GeneralizedRCNN,
    prepared: _PreparedImage,
    box: Box,
    title: str,
    names: Sequence[str],
    category: str | None,
) -> tuple[str, RoINode]:
    """Return the title of a region and the node of its score for `category`.

    By default, it is that with the best score, also background unless `title` says that the region is an object.
    """
    vertical, horizontal = prepared.scale
    scaled = [value * scale for value, scale in zip(box, (horizontal, vertical) * 2)]
    if scaled[2] <= scaled[0] or scaled[3] <= scaled[1]:
        raise UserError(f"--roi must be x1,y1,x2,y2 with x1 < x2 and y1 < y2, got {','.join(map(str, box))}")
    outputs = [BACKGROUND, *names]
    if title == BACKGROUND:
        label = 0
    elif category is None:
        with torch.no_grad():
            scores = RoINode(scaled)(network, prepared.network[None])[0]
        label = int(scores[1:].argmax()) + 1 if title else int(scores.argmax())
    else:
        label = outputs.index(category, 1)
    name = outputs[label]
    return f"{title}: {name}" if title and label else name, RoINode(scaled, label)


def _prepare(network: GeneralizedRCNN, image: Tensor) -> _PreparedImage:
    padded = pad_elongated(image)
    images, _ = network.transform([padded])
    tensor = images.tensors[0]
    height, width = images.image_sizes[0]
    mean, deviation = (
        tensor.new_tensor(values)[:, None, None]
        for values in (network.transform.image_mean, network.transform.image_std)
    )
    picture = (tensor * deviation + mean).clamp(0, 1)
    picture[:, height:], picture[:, :, width:] = 1, 1
    return _PreparedImage(tensor, picture, (height / padded.shape[1], width / padded.shape[2]))


def _choose_nodes(network: GeneralizedRCNN, image: Tensor) -> tuple[list[tuple[float, float]], list[Box], list[str]]:
    """Return points, boxes and titles of the smallest and the largest detected object and of the background."""
    height, width = image.shape[1:]
    with evaluating(network):
        found = infer(network, [image], [(width, height)], threshold=THRESHOLD)[0]
    boxes: list[list[float]] = sorted(found.boxes.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    titles = ["small object", "large object"] if len(boxes) > 1 else ["object"] * len(boxes)
    chosen = boxes if len(boxes) < 2 else [boxes[0], boxes[-1]]
    points = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in chosen]
    x, y = _background_point(boxes, width, height)
    side = max(min(width, height) / 5, 1)
    around = [max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height)]
    return [*points, (x, y)], [*chosen, around], [*titles, BACKGROUND]


def _background_point(boxes: Sequence[Box], width: int, height: int) -> tuple[float, float]:
    """Return the point farthest from all boxes and from the sides of the image."""

    def distance(point: tuple[float, float]) -> float:
        x, y = point
        to_boxes = [max(x1 - x, x - x2, y1 - y, y - y2) for x1, y1, x2, y2 in boxes]
        return min([*to_boxes, 2 * min(x, y, width - x, height - y)])

    rows, columns = ([(index + 0.5) * side / GRID for index in range(GRID)] for side in (height, width))
    return max(((x, y) for y in rows for x in columns), key=distance)


def _unique(title: str, taken: Container[str]) -> str:
    name, number = title, 2
    while name in taken:
        name, number = f"{title} {number}", number + 1
    return name
