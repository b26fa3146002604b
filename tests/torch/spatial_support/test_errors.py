"""Errors for invalid arguments, and the examples in the docstrings."""

from __future__ import annotations

import doctest
import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnops import ArgumentError, ShapeError
from dcnops.adapters.torch.spatial_support import (
    LayerNode,
    effective_bin_locations,
    effective_receptive_field,
    effective_sampling_locations,
    offset_statistics,
    sampling_locations,
)
from tests.torch.spatial_support.networks import VIEWS, Function, small_detector


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Odd(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 1, 3), Pair())
        self.unused = nn.Conv2d(1, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self[1](self[0](x))[0]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (("9", 1, 1), r"node must name a layer of the model, got '9' \(see model.named_modules\(\)\)"),
        (("unsed", 1, 1), r"got 'unsed' \(did you mean 'unused'\?\)"),
        (("1", 1, 1), "gives a map .* '1' gives tuple"),
        (("0", 1.0, 1), r"node must be in the map of '0', 7 rows and 7 columns, got y=1.0, x=1"),
        (("0", 7, 1), r"node must be in the map of '0', 7 rows and 7 columns, got y=7, x=1"),
        (("unused", 1, 1), "node must name a layer that runs for an image, 'unused' does not"),
        ("0", "node must be .* got '0'"),
        (("0", 1), r"node must be .* got \('0', 1\)"),
        (((1, 2, 3, 4), 1), "model must have backbone and roi_heads"),
    ],
)
def test_nodes(node: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        effective_receptive_field(Odd(), torch.rand(1, 9, 9), node)


@pytest.mark.parametrize("image", [torch.rand(9, 9), torch.rand(2, 1, 9, 9), torch.ones(1, 9, 9, dtype=torch.uint8)])
def test_images(image: Tensor) -> None:
    with pytest.raises(ShapeError, match="image must be"):
        effective_receptive_field(nn.Conv2d(1, 1, 3), image, ("", 1, 1))


BOX_MESSAGE = "node must have a box x1, y1, x2, y2 with x1 < x2 and y1 < y2"


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (((1, 2, 3), 1), BOX_MESSAGE),
        (((5, 1, 5, 9), 1), BOX_MESSAGE),
        (((1, 1, float("nan"), 9), 1), BOX_MESSAGE),
        ((("a", "b", "c", "d"), 1), BOX_MESSAGE),
        (((1, 1, 9, 9), 1.5), r"node must have an integer output in \[0, 4\), got 1.5"),
        (((1, 1, 9, 9), "a"), r"node must have an integer output in \[0, 4\), got 'a'"),
        (((1, 1, 9, 9), 4), r"node must have an integer output in \[0, 4\), got 4"),
        (lambda model, images: [1.0], "node must give a response .* got list"),
        (lambda model, images: images.sum(), r"node must give a response \[N, any\] .* got \(\), torch.float32"),
        (lambda model, images: images[0], r"to N = 1 images, got \(3, 64, 64\), torch.float32"),
    ],
)
def test_regions_and_functions(node: Any, message: str, detector: nn.Module) -> None:
    with pytest.raises(ArgumentError, match=message):
        effective_receptive_field(detector, torch.rand(3, 64, 64), node)


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    return small_detector()


def test_models_and_values() -> None:
    network, image, node = nn.Conv2d(1, 1, 3), torch.rand(1, 9, 9), ("", 1, 1)
    for view in VIEWS:
        with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got function"):
            view(lambda x: x, image, node)
        with pytest.raises(ArgumentError, match="image must be finite, got 1 values that are not"):
            view(network, torch.cat([image.flatten()[1:], torch.tensor([math.nan])]).view(1, 9, 9), node)
    with pytest.raises(ArgumentError, match="y and x must be numbers, got 'a' and 1"):
        LayerNode.at(network, image, "", "a", 1)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="node must be in the map of '', 7 rows and 7 columns, got y=50, x=1"):
        LayerNode("", 50, 1).position(network, image)
    for images in (None, 3, "image"):
        with pytest.raises(ArgumentError, match="images must be an image or a sequence of images, got"):
            offset_statistics(network, images)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="images must hold at least one image"):
        offset_statistics(network, [])


def test_depth_and_max_points() -> None:
    network, image = nn.Conv2d(1, 1, 3), torch.rand(1, 9, 9)
    for view in (sampling_locations, effective_sampling_locations):
        for value in (0, 1.5, "a"):
            for name in ("depth", "max_points"):
                with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1, got {value!r}"):
                    view(network, image, ("", 1, 1), **{name: value})  # type: ignore[arg-type]


def test_networks_without_a_convolution_to_watch() -> None:
    image, node = torch.rand(1, 9, 9), ("", 1, 1)
    with pytest.raises(ArgumentError, match="there is none before it"):
        sampling_locations(nn.Conv2d(1, 1, 1), image, node)
    with pytest.raises(ArgumentError, match=r"or none that gradients reach, as under torch\.no_grad\(\)"):
        sampling_locations(Function("", torch.no_grad()(nn.Conv2d(1, 1, 3))), image, node)
    with pytest.raises(ArgumentError, match="model must not hold scripted modules"):
        sampling_locations(torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 3))), image, ("0", 1, 1))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        sampling_locations(nn.Conv2d(1, 1, 12), image, node)
    with pytest.raises(ArgumentError, match="there is none before it"):
        effective_bin_locations(nn.Conv2d(1, 1, 3), image, node)


@pytest.mark.parametrize("module", ["locations", "nodes", "plots", "saliency", "statistics"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"dcnops.adapters.torch.spatial_support.{module}"))
    assert result.attempted > 0 and result.failed == 0
