"""Nodes of a network: a pixel of a feature map, a region in the head of a detector, or any function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError, ShapeError

from .grids import LOST, Grid
from .recording import Recorder, inspection


class LayerNode(NamedTuple):
    """Pixel of a layer's feature map. Its response is the vector of the C channels at the pixel.

    Attributes
    ----------
    layer : str
        Name of the layer, as in ``model.named_modules()``. It must return one map [N, C, H, W] (some layers of
        transformers return [N, H, W, C]). If it is called several times, the first call counts.
    y, x : int
        Row and column.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.spatial_support import LayerNode
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU())
    >>> LayerNode("1", y=2, x=3)(network, torch.zeros(1, 3, 6, 6)).shape
    torch.Size([1, 8])
    """

    layer: str
    y: int
    x: int

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the response [N, C] to images [N, C_image, H, W]."""
        return self.of(layer_map(model, images, self.layer))

    @staticmethod
    def at(model: nn.Module, image: Tensor, layer: str, y: float, x: float) -> LayerNode:
        """Return the pixel of a layer's map that is nearest to a position in the image [C, H, W], in pixels.

        Raises
        ------
        ArgumentError
            There is no such layer, its map cannot be located in the image, or the position is outside the image.
        ShapeError
            `image` is not a single image.
        """
        if not (isinstance(y, Real) and isinstance(x, Real)):
            raise ArgumentError(f"y and x must be numbers, got {y!r} and {x!r}")
        feature_map, grid = _located_map(model, image, layer)
        if not (0 <= y < image.shape[-2] and 0 <= x < image.shape[-1]):
            raise ArgumentError(f"y and x must be in the image of {tuple(image.shape[-2:])}, got {y} and {x}")
        row, column = grid.from_image(torch.tensor([y, x], dtype=torch.float64)).round().tolist()
        height, width = feature_map.shape[2:]
        return LayerNode(layer, int(min(max(row, 0), height - 1)), int(min(max(column, 0), width - 1)))

    def position(self, model: nn.Module, image: Tensor) -> tuple[float, float]:
        """Return the position (y, x) of the node in the image [C, H, W], in pixels, or raise the errors of `at`."""
        feature_map, grid = _located_map(model, image, self.layer)
        self.of(feature_map)
        y, x = grid.to_image(torch.tensor([self.y, self.x], dtype=torch.float64)).tolist()
        return y, x

    def of(self, feature_map: Tensor) -> Tensor:
        """Return the response [N, C] from a map [N, C, H, W] of the layer."""
        height, width = feature_map.shape[2:]
        whole = all(isinstance(value, Integral) for value in (self.y, self.x))
        if not (whole and 0 <= self.y < height and 0 <= self.x < width):
            raise ArgumentError(
                f"node must be in the map of {self.layer!r}, {height} rows and {width} columns, "
                f"got y={self.y}, x={self.x}"
            )
        return feature_map[:, :, self.y, self.x]


class RoINode(NamedTuple):
    """Region in the box head of a torchvision detector (`backbone` and `roi_heads`).

    The response is a vector of class scores or of features. `output` selects one of its numbers.

    Attributes
    ----------
    box : sequence of 4 numbers
        x1, y1, x2, y2, in pixels of the network's input.
    output : int, optional
        Index of the class (0 is the background) or of the feature. By default all of them form the response.
    part : "class" or "features"
        Read the class scores (logits), or the features that the box head passes to the layers of scores and boxes. In
        the usual head these are the output of the second fully connected layer, the node of the paper's figure 2.

    Examples
    --------
    >>> import torch, torchvision
    >>> from dcnops.adapters.torch.spatial_support import RoINode
    >>> detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
    ...     weights=None, weights_backbone=None, num_classes=5).eval()
    >>> RoINode((10, 10, 60, 50), output=3)(detector, torch.zeros(1, 3, 64, 96)).shape
    torch.Size([1, 1])
    """

    box: Sequence[float]
    output: int | None = None
    part: Literal["class", "features"] = "class"

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return the response [N, outputs] to resized and normalised images [N, 3, H, W]."""
        heads: Any = getattr(model, "roi_heads", None)
        if not all(hasattr(heads, name) for name in ("box_roi_pool", "box_head", "box_predictor")):
            raise ArgumentError(
                "model must have backbone and roi_heads with box_roi_pool, box_head and box_predictor for a RoINode, "
                f"got {type(model).__name__}; a function (model, images) -> response can be the node of any model"
            )
        if self.part not in ("class", "features"):
            raise ArgumentError(f'node must have the part "class" or "features", got {self.part!r}')
        numbers = all(isinstance(value, Real) for value in self.box)
        if len(self.box) != 4 or not numbers or not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ArgumentError(f"node must have a box x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {self.box}")
        backbone: Any = model.backbone
        features = backbone(images)
        if isinstance(features, Tensor):
            features = {"0": features}
        boxes = [images.new_tensor([self.box])] * len(images)
        pooled = heads.box_roi_pool(features, boxes, [tuple(images.shape[-2:])] * len(images))
        response: Tensor = heads.box_head(pooled)
        if self.part == "class":
            response = heads.box_predictor(response)[0]
        if self.output is None:
            return response
        if not (isinstance(self.output, Integral) and 0 <= self.output < response.shape[1]):
            raise ArgumentError(f"node must have an integer output in [0, {response.shape[1]}), got {self.output!r}")
        return response[:, self.output, None]


NodeFunction: TypeAlias = LayerNode | RoINode | Callable[[nn.Module, Tensor], Tensor]
Node: TypeAlias = NodeFunction | tuple[Any, ...]
"""A node, its plain tuple, or any function (model, images [N, C, H, W]) -> response [N, any]."""


def as_node(node: Node) -> NodeFunction:
    """Convert a plain tuple to a node."""
    if callable(node):
        return node
    if isinstance(node, tuple) and len(node) == 3 and isinstance(node[0], str):
        return LayerNode(*node)
    region = isinstance(node, tuple) and 1 <= len(node) <= 3 and isinstance(node[0], Sequence)
    if region and not isinstance(node[0], str):
        return RoINode(*node)
    raise ArgumentError(
        "node must be (layer, y, x), (box,), (box, class), (box, feature, 'features') or a function of model and "
        f"images, got {node!r}"
    )


def as_image(image: Tensor) -> Tensor:
    """Check an image and return a copy of it as a batch of one."""
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim not in (3, 4):
        raise ShapeError(f"image must be a tensor [C, H, W] or [1, C, H, W] of a floating type, got {_describe(image)}")
    batch = image if image.ndim == 4 else image[None]
    if len(batch) != 1 or not batch.numel():
        raise ShapeError(f"image must be one image, and not empty, got shape {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ArgumentError(f"image must be finite, got {int((~image.isfinite()).sum())} values that are not")
    return batch.detach().clone()


def check_count(name: str, value: object) -> None:
    """Raise an ArgumentError unless a value is a positive integer."""
    if not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")


def _describe(value: object) -> str:
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def is_detector(model: nn.Module) -> bool:
    """Return True for a torchvision detector, which takes a list of images and resizes them itself."""
    return hasattr(model, "backbone") and hasattr(model, "transform")


class _LayerReached(Exception):
    """Signal to end a forward pass after the layer of interest."""


def layer_map(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """Run a model up to a layer and return the layer's map [N, C, H, W]."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        close = [name for name in modules if name.endswith(f".{layer}")] or get_close_matches(str(layer), modules)
        hint = f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else "see model.named_modules()"
        raise ArgumentError(f"node must name a layer of the model, got {layer!r} ({hint})")
    found: list[object] = []

    def stop(module: nn.Module, args: Any, result: object) -> None:
        found.append(result)
        raise _LayerReached

    hook = modules[layer].register_forward_hook(stop)
    try:
        # A detector takes a list of raw images. Its resizing and normalisation are not part of the network.
        network: Any = model.backbone if is_detector(model) else model
        network(images)
    except _LayerReached:
        pass
    finally:
        hook.remove()
    if not found:
        raise ArgumentError(f"node must name a layer that runs for an image, {layer!r} does not")
    result = found[0]
    if not isinstance(result, Tensor) or result.ndim != 4:
        raise ArgumentError(
            f"node must name a layer that gives a map [N, C, H, W], {layer!r} gives {_describe(result)}"
        )
    return result


def node_grid(grid: Grid | None, layer: str) -> Grid:
    """Return the grid of a node's map, or raise an ArgumentError if the map cannot be located."""
    if grid is None:
        raise ArgumentError(f"node must have a place in the image, the map of {layer!r} {LOST}")
    return grid


def _located_map(model: nn.Module, image: Tensor, layer: str) -> tuple[Tensor, Grid]:
    with inspection(model), torch.no_grad(), Recorder(model, images := as_image(image)) as recorder:
        feature_map = layer_map(model, images, layer)
    return feature_map, node_grid(recorder.grids[feature_map], layer)


def respond(node: NodeFunction, model: nn.Module, images: Tensor) -> Tensor:
    """Return the response [N, any] of a node to images [N, C, H, W]."""
    response: object = node(model, images)
    if not isinstance(response, Tensor) or not response.is_floating_point() or response.shape[:1] != images.shape[:1]:
        raise ArgumentError(
            f"node must give a response [N, any] of a floating type to N = {len(images)} images, "
            f"got {_describe(response)}"
        )
    return response.reshape(len(images), -1)


def magnitude(response: Tensor) -> Tensor:
    """Return the norm of a response; for a single number, that is its absolute value."""
    norm: Tensor = torch.linalg.vector_norm(response)
    return norm
