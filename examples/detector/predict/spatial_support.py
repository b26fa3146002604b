"""Where trained detectors look: figures 1 and 2 of the paper for an image, and histograms of offsets and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from dcnops.adapters.torch.spatial_support import LayerNode, RoINode, offset_statistics
from dcnops.adapters.torch.spatial_support.plots import plot_statistics, plot_support
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcnops import ArgumentError

from ..data import Category, check_categories, pad_elongated, read_image
from ..errors import UserError
from ..model import load_detector
from .inference import Detections, evaluating, infer
from .prediction import LARGEST

CONV5 = "backbone.body.layer4"
THRESHOLD = 0.3  # score of the detections that the nodes are taken from
GRID = 24  # places along a side where the background is looked for

BACKGROUND = "background"

Box = Sequence[float]


class _Input(NamedTuple):
    """An image as networks are given it."""

    network: Tensor  # [3, H, W], resized, normalised and padded
    picture: Tensor  # [3, H, W] in 0..1, white where there is padding
    scale: tuple[float, float]  # pixels of it for one of the image file, vertical and horizontal


@dataclass(frozen=True)
class View:
    """What is drawn.

    Attributes
    ----------
    figure
        1: of pixels of a layer; 2: of regions.
    points
        (x, y) in pixels of the image, the nodes of figure 1.
    boxes
        x1, y1, x2, y2 in pixels of the image, the regions of figure 2. Without points and boxes, the nodes are those of
        the smallest and the largest object that the last network detects, and of the background.
    category
        Whose score is the node of a region; by default the best of the last network.
    layer
        Whose pixels are the nodes of figure 1.
    depth, bound, budget
        As in `dcnops.adapters.torch.spatial_support.plots.plot_support`.
    """

    figure: int = 1
    points: Sequence[tuple[float, float]] = ()
    boxes: Sequence[Box] = ()
    category: str | None = None
    layer: str = CONV5
    depth: int = 3
    bound: float = 0.1
    budget: int = 4000


def run_support(
    checkpoints: Sequence[Path],
    image: Path,
    out: Path,
    device: torch.device,
    view: View,
    *,
    assignments: Sequence[str] = (),
) -> list[Path]:
    """Draw a figure for an image and, for each network with deformable layers, the histograms.

    Parameters
    ----------
    checkpoints
        Of networks for the same categories; each has its part of the figure.

    Returns
    -------
    The files that were written into `out`.

    Raises
    ------
    UserError
        Something given is wrong or cannot be read.
    """
    networks: dict[str, GeneralizedRCNN] = {}
    categories: list[Category] = []
    for path in checkpoints:
        network, config, found = load_detector(path, device, assignments)
        if categories:
            check_categories(categories, found, str(path))
        categories = found
        title = config.network.preset
        networks[title if title not in networks else f"{title} ({path.parent.name or len(networks)})"] = network
    if len(networks) < len(checkpoints):
        raise UserError(f"--checkpoint: networks with the same preset must lie in different folders, got {checkpoints}")
    pixels, _ = read_image(image, LARGEST)
    try:
        drawn = draw_support(networks, pixels.to(device), [item.name for item in categories], view)
        figures = {f"{image.stem}-figure{view.figure}.png": drawn}
        for title, network in networks.items():
            if statistics := offset_statistics(network, pixels.to(device)):
                figures[f"{image.stem}-offsets-{title}.png"] = plot_statistics(statistics)
    except ArgumentError as error:
        raise UserError(str(error)) from None
    paths = []
    for name, item in figures.items():
        try:
            out.mkdir(parents=True, exist_ok=True)
            item.savefig(out / name)
        except OSError as error:
            raise UserError(f"{out / name}: cannot be written ({error.strerror})") from None
        paths.append(out / name)
    return paths


def draw_support(networks: dict[str, GeneralizedRCNN], image: Tensor, names: Sequence[str], view: View) -> Figure:
    """The figure for networks with titles, an image [3, H, W] in 0..1 and names of the categories."""
    inputs = [_prepare(network, image) for network in networks.values()]
    if any(item.network.shape != inputs[0].network.shape for item in inputs):
        shapes = [tuple(item.network.shape[1:]) for item in inputs]
        raise UserError(f"the networks must take images of the same size, got {shapes}: set network.min_size")
    given, last = inputs[-1], list(networks.values())[-1]
    if view.category is not None and view.category not in names:
        raise UserError(f"--category must be one of {', '.join(names)}, got {view.category!r}")
    if view.points or view.boxes:
        points, boxes = view.points, view.boxes
        titles = [f"x {x:g}, y {y:g}" for x, y in points] if view.figure == 1 else [""] * len(boxes)
    else:
        points, boxes, titles = _choose(last, image)
    nodes: dict[str, LayerNode | RoINode] = {}
    for (x, y), title in zip(points, titles) if view.figure == 1 else ():
        if not (0 <= x < image.shape[2] and 0 <= y < image.shape[1]):
            raise UserError(f"--node must be in the image of {image.shape[2]}x{image.shape[1]} pixels, got {x:g},{y:g}")
        row, column = ((value + 0.5) * scale - 0.5 for value, scale in zip((y, x), given.scale))
        nodes[_free(title, nodes)] = LayerNode.at(last, given.network, view.layer, max(row, 0), max(column, 0))
    for box, of in zip(boxes, titles) if view.figure == 2 else ():
        vertical, horizontal = given.scale
        scaled = [value * scale for value, scale in zip(box, (horizontal, vertical) * 2)]
        if scaled[2] <= scaled[0] or scaled[3] <= scaled[1]:
            raise UserError(f"--roi must be x1,y1,x2,y2 with x1 < x2 and y1 < y2, got {','.join(map(str, box))}")
        if of == BACKGROUND:
            nodes[of] = RoINode(scaled, 0)
            continue
        label = _best_class(last, given.network, scaled) if view.category is None else names.index(view.category) + 1
        title = f"{of}: {names[label - 1]}" if of else names[label - 1]
        nodes[_free(title, nodes)] = RoINode(scaled, label)
    if not nodes:
        raise UserError("figure 1 is of pixels (--node), figure 2 of regions (--roi)")
    return plot_support(
        networks, given.network, nodes, given.picture, depth=view.depth, bound=view.bound, budget=view.budget
    )


def _prepare(network: GeneralizedRCNN, image: Tensor) -> _Input:
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
    return _Input(tensor, picture, (height / padded.shape[1], width / padded.shape[2]))


def _choose(network: GeneralizedRCNN, image: Tensor) -> tuple[list[tuple[float, float]], list[Box], list[str]]:
    """Places and boxes of the smallest and the largest object found, and of the background; and their titles."""
    height, width = image.shape[1:]
    with evaluating(network):
        found: Detections = infer(network, [image], [(width, height)], threshold=THRESHOLD)[0]
    boxes: list[list[float]] = sorted(found.boxes.tolist(), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    titles = ["small object", "large object"] if len(boxes) > 1 else ["object"] * len(boxes)
    chosen = boxes if len(boxes) < 2 else [boxes[0], boxes[-1]]
    points = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in chosen]
    x, y = _background(boxes, width, height)
    side = max(min(width, height) / 5, 1)
    around = [max(x - side / 2, 0), max(y - side / 2, 0), min(x + side / 2, width), min(y + side / 2, height)]
    return [*points, (x, y)], [*chosen, around], [*titles, BACKGROUND]


def _background(boxes: Sequence[Box], width: int, height: int) -> tuple[float, float]:
    """The place farthest from all boxes, and from the sides of the image."""
    best, place = -1.0, (width / 2, height / 2)
    for row in range(GRID):
        for column in range(GRID):
            x, y = (column + 0.5) * width / GRID, (row + 0.5) * height / GRID
            to_boxes = [max(x1 - x, x - x2, y1 - y, y - y2) for x1, y1, x2, y2 in boxes]
            distance = min([*to_boxes, 2 * min(x, y, width - x, height - y)])
            if distance > best:
                best, place = distance, (x, y)
    return place


def _best_class(network: GeneralizedRCNN, image: Tensor, box: Box) -> int:
    """The class, other than the background, that a network scores highest for a region."""
    with torch.no_grad():
        scores = RoINode(box)(network, image[None])[0]
    return int(scores[1:].argmax()) + 1


def _free(title: str, taken: dict[str, LayerNode | RoINode]) -> str:
    number = 2
    name = title
    while name in taken:
        name, number = f"{title} {number}", number + 1
    return name
