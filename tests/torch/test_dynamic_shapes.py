"""Programs of `torch.export` and `torch.compile` for sizes and numbers that change from call to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from dcnops import ShapeError
from dcnops.adapters.torch import (
    DeformConv2dPack,
    DeformRoIPool,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    deform_conv2d,
    deform_roi_pool,
)

CHANNELS = 32
"""More than the height and width of the example that is traced, less than others."""

SIZES = ((1, 24, 16, 0), (3, 40, 48, 1), (2, 100, 3, 40))
"""Batch, height, width and number of regions of further calls: portrait, larger, a strip."""


class Net(nn.Module):
    """All operations, as functions and as layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(CHANNELS, CHANNELS, 3, 3))
        self.layers = nn.Sequential(
            DeformConv2dPack(CHANNELS, CHANNELS, 3, padding=1), ModulatedDeformConv2dPack(CHANNELS, 4, 3, padding=1)
        )
        self.pool = ModulatedDeformRoIPoolPack(2, 4, 8, spatial_scale=0.25)
        for branch in (*(layer.conv_offset for layer in self.layers), self.pool.offset_fc[-1]):
            nn.init.normal_(branch.weight, std=0.1)

    def forward(self, image: Tensor, offset: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        features = self.layers(deform_conv2d(image, offset, self.weight, padding=1))
        shift = features.new_zeros(rois.shape[0], 2, 2, 2)
        return self.pool(features, rois), deform_roi_pool(image, rois, shift, output_size=2, spatial_scale=0.5)


def inputs(N: int, H: int, W: int, R: int) -> tuple[Tensor, Tensor, Tensor]:
    rois = torch.rand(R, 5) * 40
    rois[:, 0] = torch.arange(R) % N
    return torch.rand(N, CHANNELS, H, W), torch.randn(N, 18, H, W), rois


def named_dims() -> Any:
    """The offset's sizes have names of their own: nothing relates them to the image while the program is traced."""
    images, regions, height, width, oh, ow = map(Dim, ("images", "regions", "height", "width", "oh", "ow"))
    width = Dim("width", min=2, max=4096)
    return {0: images, 2: height, 3: width}, {0: images, 2: oh, 3: ow}, {0: regions}


def automatic_dims() -> Any:
    return {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}, {0: Dim.AUTO}


@pytest.mark.slow
@pytest.mark.parametrize("dims", [named_dims, automatic_dims])
def test_exported_programs_take_other_sizes(dims: Callable[[], Any]):
    net = Net().eval()
    program = torch.export.export(net, inputs(2, 16, 24, 3), dynamic_shapes=dims()).module()
    for sizes in SIZES:
        # Automatic sizes are at least 2.
        arguments = inputs(*(sizes if dims is named_dims else (max(size, 2) for size in sizes)))
        for actual, expected in zip(program(*arguments), net(*arguments)):
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_export_with_sizes_that_depend_on_values():
    class Selecting(Net):
        def forward(self, image: Tensor, offset: Tensor, rois: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
            height = rows.item()
            torch._check(height >= 1)
            torch._check(height <= 16)
            crop = image[:, :, :height], offset[:, :, :height], rois[torch.where(rois[:, 1] > 10)[0]]
            return super().forward(*crop)

    net = Selecting().eval()
    program = torch.export.export(net, (*inputs(2, 16, 24, 9), torch.tensor(9))).module()
    for rows in (16, 1):
        arguments = (*inputs(2, 16, 24, 9), torch.tensor(rows))
        for actual, expected in zip(program(*arguments), net(*arguments)):
            torch.testing.assert_close(actual, expected)


class Compiled:
    """A compiled function that counts its graphs."""

    def __init__(self, function: Callable[..., Any], backend: str = "eager", **options: Any) -> None:
        torch._dynamo.reset()
        self.graphs = 0
        self._backend = torch._dynamo.lookup_backend(backend)
        self.call = torch.compile(function, fullgraph=True, backend=self._compile, **options)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return self._backend(graph, inputs)


@pytest.mark.slow
def test_one_compilation_for_all_sizes():
    net = Net()
    compiled = Compiled(net, backend="aot_eager", dynamic=True)
    graphs = []
    for N, H, W, R in ((2, 16, 24, 3), (3, 24, 16, 5), (4, 40, 48, 2)):
        image, *others = inputs(N, H, W, R)
        image = image.to(memory_format=torch.channels_last)
        gradients = []
        for call in (compiled.call, net):
            outputs = call(image, *others)
            gradients.append(torch.autograd.grad(sum(map(torch.sum, outputs)), list(net.parameters())))
        for actual, expected in zip(*gradients):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)
        graphs.append(compiled.graphs)
    assert graphs == [graphs[0]] * 3


def test_symbolic_sizes_are_checked_when_the_operator_runs():
    image, offset, _ = inputs(2, 16, 24, 3)
    weight = torch.rand(8, CHANNELS, 3, 3)
    compiled = Compiled(deform_conv2d, dynamic=True)
    compiled.call(image, offset, weight, padding=1)
    with pytest.raises(ShapeError, match=r"offset must be \[N=2, 2\*D\*3\*3, oh=20, ow=24\]"):
        compiled.call(torch.rand(2, CHANNELS, 20, 24), offset, weight, padding=1)


IMAGE, ROIS = torch.rand(1, 4, 16, 16), torch.tensor([[0.0, 0, 0, 60, 60]])
NUMBERS: dict[str, tuple[Callable[[Any], Tensor], tuple[Any, ...]]] = {
    "spatial_scale": (lambda n: deform_roi_pool(IMAGE, ROIS, output_size=3, spatial_scale=n), (1 / 4, 1 / 8, 1 / 16)),
    "gamma": (lambda n: deform_roi_pool(IMAGE, ROIS, torch.ones(1, 2, 3, 3), output_size=3, gamma=n), (0.1, 1.0, 0.3)),
    "sampling_ratio": (lambda n: deform_roi_pool(IMAGE, ROIS, output_size=3, sampling_ratio=n), (2, 3, 4)),
    "output_size": (lambda n: deform_roi_pool(IMAGE, ROIS, output_size=(n, 3)), (2, 3, 4)),
    "layer": (lambda n: DeformRoIPool(3, n)(IMAGE, ROIS), (1 / 4, 1 / 8, 1 / 16)),
    "padding and dilation": (
        lambda n: deform_conv2d(IMAGE, IMAGE.new_ones(1, 18, 16, 16), IMAGE[:, :, :3, :3], None, 1, n, n),
        (2, 3, 4),
    ),
    "stride": (
        lambda n: deform_conv2d(IMAGE, IMAGE.new_ones(1, 18, 13 // n + 1, 14), IMAGE[:, :, :3, :3], None, (n, 1)),
        (2, 3, 4),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_change_without_graph_breaks(name: str):
    function, numbers = NUMBERS[name]
    compiled = Compiled(function)
    for number in numbers:
        torch.testing.assert_close(compiled.call(number), function(number))
    # torch.compile treats floating-point arguments of operators as constants.
    assert compiled.graphs == (len(numbers) if isinstance(numbers[0], float) else 2)
