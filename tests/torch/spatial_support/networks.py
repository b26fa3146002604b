"""Networks for the tests and a comparison of sampling points."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_fpn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from dcnops.adapters.torch.spatial_support import (
    effective_receptive_field,
    effective_sampling_locations,
    error_bounded_saliency_region,
    offset_statistics,
    sampling_locations,
)

Points = dict[tuple[float, float], float]

VIEWS = [
    sampling_locations,
    effective_sampling_locations,
    effective_receptive_field,
    error_bounded_saliency_region,
    lambda model, image, node: offset_statistics(model, image),
]


def randomise_branches(model: nn.Module, deviation: float = 1.0) -> nn.Module:
    """Give all offset branches random weights, so that offsets and masks depend on the image."""
    for module in model.modules():
        branch = getattr(module, "conv_offset", None) or getattr(module, "offset_fc", None)
        if branch is not None:
            for parameter in branch.parameters():
                nn.init.normal_(parameter, std=deviation / math.sqrt(parameter[0].numel()))
    return model


def small_detector(**options: int) -> GeneralizedRCNN:
    """Return a detector of four classes with random weights."""
    return fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None, num_classes=4, **options)


class Function(nn.Module):
    """Module that applies a function; the name identifies it in the ids of tests."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Network(nn.Module):
    """Module with given submodules and a function (network, x) as its forward pass."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def as_dict(points: Any) -> Points:
    return {(y, x): s for (y, x), s in zip(points.positions.tolist(), points.strength.tolist())}


def assert_same(found: Points, expected: Points) -> None:
    """Check that both have the same strength around the same positions."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    for points, sign in ((found, 1), (expected, -1)):
        for (y, x), strength in points.items():
            total[(round(y * 100), round(x * 100))] += sign * strength
    # A position at the edge of a rounding interval may count in the neighbouring one.
    for (y, x), rest in total.items():
        around = sum(total.get((y + i, x + j), 0) for i, j in itertools.product((-1, 0, 1), repeat=2))
        assert abs(rest) < 1e-4 or abs(around) < 1e-4, (y, x, rest)
