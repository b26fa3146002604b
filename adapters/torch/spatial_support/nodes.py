"""What of a network is looked at: a pixel of a layer's map, or a region in the head of a detector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError, ShapeError

from .places import LOST, Grid
from .recording import Recorder, undisturbed


class LayerNode(NamedTuple):
    """A pixel of a layer's map; its response are the map's C channels there.

    Attributes
    ----------
    layer : str
        Name of the layer, as in ``model.named_modules()``. It must give one map [N, C, H, W] (not [N, H, W, C], as some
        layers of transformers do); if it is called several times, the first counts.
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
        """The response [N, C] to images [N, C_image, H, W]."""
        return self.of(layer_map(model, images, self.layer))

    @staticmethod
    def at(model: nn.Module, image: Tensor, layer: str, y: float, x: float) -> LayerNode:
        """The pixel of a layer's map that is nearest to a position of the image [C, H, W], in pixels.

        Raises
        ------
        ArgumentError
            There is no such layer, its map has no place in the image, or the position is no place in the image.
        ShapeError
            `image` is none.
        """
        if not (isinstance(y, Real) and isinstance(x, Real)):
            raise ArgumentError(f"y and x must be numbers, got {y!r} and {x!r}")
        feature_map, grid = _located(model, image, layer)
        if not (0 <= y < image.shape[-2] and 0 <= x < image.shape[-1]):
            raise ArgumentError(f"y and x must be in the image of {tuple(image.shape[-2:])}, got {y} and {x}")
        row, column = grid.from_image(torch.tensor([y, x], dtype=torch.float64)).round().tolist()
        height, width = feature_map.shape[2:]
        return LayerNode(layer, int(min(max(row, 0), height - 1)), int(min(max(column, 0), width - 1)))

    def position(self, model: nn.Module, image: Tensor) -> tuple[float, float]:
        """Where the node lies in the image [C, H, W], (y, x) in pixels.

        Raises
        ------
        ArgumentError
            There is no such layer, its map has no place in the image, or the map has no such pixel.
        ShapeError
            `image` is none.
        """
        feature_map, grid = _located(model, image, self.layer)
        self.of(feature_map)
        y, x = grid.to_image(torch.tensor([self.y, self.x], dtype=torch.float64)).tolist()
        return y, x

    def of(self, feature_map: Tensor) -> Tensor:
        """The response [N, C] that is in a map [N, C, H, W] of the layer."""
        height, width = feature_map.shape[2:]
        whole = all(isinstance(value, Integral) for value in (self.y, self.x))
        if not (whole and 0 <= self.y < height and 0 <= self.x < width):
            raise ArgumentError(
                f"node must be in the map of {self.layer!r}, {height} rows and {width} columns, "
                f"got y={self.y}, x={self.x}"
            )
        return feature_map[:, :, self.y, self.x]


class RoINode(NamedTuple):
    """A region in the box head of a detector of torchvision's kind (`backbone` and `roi_heads`).

    Attributes
    ----------
    box : sequence of 4 numbers
        x1, y1, x2, y2, in pixels of the network's input.
    output : int, optional
        Number of the class, 0 being the background, or of the unit; by default all of them are the response.
    part : "class" or "unit"
        The scores (logits) of the classes, or the features that the box head gives.

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
    part: Literal["class", "unit"] = "class"

    def __call__(self, model: nn.Module, images: Tensor) -> Tensor:
        """The response [N, 1], or [N, all], to images [N, 3, H, W] that are resized and normalised."""
        heads: Any = getattr(model, "roi_heads", None)
        if not all(hasattr(heads, name) for name in ("box_roi_pool", "box_head", "box_predictor")):
            raise ArgumentError(
                "model must have backbone and roi_heads with box_roi_pool, box_head and box_predictor for a RoINode, "
                f"got {type(model).__name__}; a function (model, images) -> response can be the node of any model"
            )
        if self.part not in ("class", "unit"):
            raise ArgumentError(f'node must have the part "class" or "unit", got {self.part!r}')
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


Respond: TypeAlias = LayerNode | RoINode | Callable[[nn.Module, Tensor], Tensor]
Node: TypeAlias = Respond | tuple[Any, ...]
"""A node, the plain tuple of one, or any function (model, images [N, C, H, W]) -> response [N, any]."""


def as_node(node: Node) -> Respond:
    """The node that a plain tuple stands for.

    Raises
    ------
    ArgumentError
        It stands for none.
    """
    if callable(node):
        return node
    if isinstance(node, tuple) and len(node) == 3 and isinstance(node[0], str):
        return LayerNode(*node)
    region = isinstance(node, tuple) and 1 <= len(node) <= 3 and isinstance(node[0], Sequence)
    if region and not isinstance(node[0], str):
        return RoINode(*node)
    raise ArgumentError(
        "node must be (layer, y, x), (box,), (box, class), (box, unit, 'unit') or a function of model and images, "
        f"got {node!r}"
    )


def as_image(image: Tensor) -> Tensor:
    """A copy of the image as a batch of one.

    Raises
    ------
    ShapeError
        It is not [C, H, W] or [1, C, H, W], or of an integer type.
    ArgumentError
        It is not finite.
    """
    if not isinstance(image, Tensor) or not image.is_floating_point() or image.ndim not in (3, 4):
        raise ShapeError(
            f"image must be a tensor [C, H, W] or [1, C, H, W] of a floating type, got {_described(image)}"
        )
    batch = image if image.ndim == 4 else image[None]
    if len(batch) != 1 or not batch.numel():
        raise ShapeError(f"image must be one image, and not empty, got shape {tuple(image.shape)}")
    if not image.isfinite().all():
        raise ArgumentError(f"image must be finite, got {int((~image.isfinite()).sum())} values that are not")
    return batch.detach().clone()


def check_count(name: str, value: object) -> None:
    """A number of things, from 1 on.

    Raises
    ------
    ArgumentError
        It is none.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")


def _described(value: object) -> str:
    return f"{tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def is_detector(model: nn.Module) -> bool:
    """Whether a model is a detector of torchvision's kind, called with a list of images, which it resizes itself."""
    return hasattr(model, "backbone") and hasattr(model, "transform")


class _Reached(Exception):
    """Ends a forward pass after the layer of interest."""


def layer_map(model: nn.Module, images: Tensor, layer: str) -> Tensor:
    """The map [N, C, H, W] of a layer; what comes after it does not run.

    Raises
    ------
    ArgumentError
        There is no such layer, or it does not run, or gives something else.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer not in modules:
        close = [name for name in modules if name.endswith(f".{layer}")] or get_close_matches(str(layer), modules)
        hint = f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else "see model.named_modules()"
        raise ArgumentError(f"node must name a layer of the model, got {layer!r} ({hint})")
    found: list[object] = []

    def take(module: nn.Module, args: Any, result: object) -> None:
        found.append(result)
        raise _Reached

    hook = modules[layer].register_forward_hook(take)
    try:
        # Detectors take lists of raw images, and what they resize and normalise them with is no part of the network.
        network: Any = model.backbone if is_detector(model) else model
        network(images)
    except _Reached:
        pass
    finally:
        hook.remove()
    if not found:
        raise ArgumentError(f"node must name a layer that runs for an image, {layer!r} does not")
    result = found[0]
    if not isinstance(result, Tensor) or result.ndim != 4:
        raise ArgumentError(
            f"node must name a layer that gives a map [N, C, H, W], {layer!r} gives {_described(result)}"
        )
    return result


def _located(model: nn.Module, image: Tensor, layer: str) -> tuple[Tensor, Grid]:
    """The map of a layer and where it lies."""
    with undisturbed(model), torch.no_grad(), Recorder(model, images := as_image(image)) as recorder:
        feature_map = layer_map(model, images, layer)
    grid = recorder.grids[feature_map]
    if grid is None:
        raise ArgumentError(f"node must have a place in the image, the map of {layer!r} {LOST}")
    return feature_map, grid


def respond(node: Respond, model: nn.Module, images: Tensor) -> Tensor:
    """The response [N, any] to images [N, C, H, W].

    Raises
    ------
    ArgumentError
        The node gives something else.
    """
    response: object = node(model, images)
    if not isinstance(response, Tensor) or not response.is_floating_point() or response.shape[:1] != images.shape[:1]:
        raise ArgumentError(
            f"node must give a response [N, any] of a floating type to N = {len(images)} images, "
            f"got {_described(response)}"
        )
    return response.reshape(len(images), -1)


def magnitude(response: Tensor) -> Tensor:
    """The norm of a response [1, any], a number; that of a response of one number is its absolute value."""
    norm: Tensor = torch.linalg.vector_norm(response)
    return norm
