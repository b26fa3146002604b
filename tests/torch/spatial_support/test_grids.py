"""Locations of maps in the image, compared with the centres of the pixels' receptive fields."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcnops import ArgumentError
from dcnops.adapters.torch import DeformRoIPool, MultiScaleDeformRoIPool
from dcnops.adapters.torch.spatial_support import LayerNode, effective_sampling_locations, sampling_locations
from dcnops.adapters.torch.spatial_support.recording import Recorder
from tests.torch.spatial_support.networks import Function, Network, as_dict

NETWORKS: tuple[tuple[nn.Module, ...], ...] = (
    (nn.Conv2d(1, 2, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1)),
    (nn.Conv2d(1, 2, 2, stride=2), nn.AvgPool2d(2, 2), nn.Conv2d(2, 2, 1, stride=2)),
    (nn.Conv2d(1, 2, 3, stride=2, padding="valid"), nn.Upsample(scale_factor=2, mode="bilinear")),
    (nn.AvgPool2d(4), nn.Conv2d(1, 2, 3, padding="same"), nn.Upsample(scale_factor=4, mode="bilinear")),
    (nn.ZeroPad2d((3, 0, 1, 2)), nn.Conv2d(1, 2, 3)),
    (nn.Conv2d(1, 2, 4, stride=4), nn.ConvTranspose2d(2, 2, 3, stride=2, padding=1)),
    (nn.PixelUnshuffle(2), nn.Conv2d(4, 2, 3, padding=1)),
    (nn.AdaptiveAvgPool2d(10), nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect")),
    (nn.Conv2d(1, 2, 1), nn.Upsample(size=(19, 19), mode="bilinear", align_corners=True)),
    (
        nn.Conv2d(1, 2, 3, stride=2),
        Function("channel shuffle", lambda x: x.view(1, 2, 1, 19, 19).transpose(1, 2).flatten(1, 2)),
    ),
    (nn.AvgPool2d(2), Function("tokens", lambda x: x.flatten(2).mT.mT.reshape(1, 1, 20, 20)), nn.Conv2d(1, 2, 3)),
    (nn.AvgPool2d(2), Function("right half", lambda x: x.chunk(2, -1)[1]), nn.Conv2d(1, 2, 3)),
    (Function("lower part", lambda x: torch.split(x, [7, 33], 2)[1]), nn.Conv2d(1, 2, 3)),
    (nn.Conv2d(1, 3, 3), Function("one channel", lambda x: x.split(1, 1)[2]), nn.Conv2d(1, 2, 3)),
    (nn.Conv2d(1, 1, 3), Function("slices", lambda x: x[..., 3:, 2::2]), nn.Conv2d(1, 2, 3)),
    (Function("narrow", lambda x: x.narrow(2, 5, 20).narrow(-1, 3, 30)), nn.Conv2d(1, 2, 3)),
    (Function("slices and list", lambda x: x[:, [0, 0], None, 8:, 3::2][:, :1, 0]), nn.Conv2d(1, 2, 3)),
    (Function("every second row", lambda x: x[:, :, list(range(1, 40, 2))]), nn.Conv2d(1, 2, 3)),
    (Function("channels alone", lambda x: x.repeat(1, 2, 1, 1).roll(1, 1).flip(1)[:, :1]), nn.Conv2d(1, 2, 3)),
    (Function("transposed twice", lambda x: x[:, :, 9:].mT.narrow(2, 5, 35).mT), nn.Conv2d(1, 2, 3)),
    (Function("focus", lambda x: torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], 1)), nn.Conv2d(2, 2, 3)),
    (Function("circular", lambda x: torch.cat([x[..., -4:], x, x[..., :4]], -1)[..., 4:]), nn.Conv2d(1, 2, 3)),
    (Function("last part", lambda x: torch.hsplit(torch.dsplit(x, [8])[1], 1)[0]), nn.Conv2d(1, 2, 3)),
    (nn.LPPool2d(1, 3, stride=2), nn.Conv2d(1, 2, 3)),
    (nn.AvgPool2d(8), nn.Upsample(scale_factor=1.5, mode="bilinear"), nn.Conv2d(1, 2, 1)),
    (nn.ZeroPad2d((0, 1, 0, 3)), nn.Upsample(scale_factor=0.5, mode="bilinear"), nn.Conv2d(1, 2, 1)),
    (
        Function("channels last", lambda x: nn.functional.pad(x.permute(0, 2, 3, 1), (0, 0, 2, 0, 3, 1))),
        Function("every second", lambda x: torch.cat([x[:, ::2, ::2], x[:, 1::2, 1::2]], 3)),
        Function("channels first", lambda x: x.movedim(-1, 1)),
        nn.Conv2d(2, 2, 3),
    ),
)


@pytest.mark.parametrize("layers", NETWORKS, ids=str)
def test_a_pixel_lies_in_the_middle_of_its_receptive_field(layers: tuple[nn.Module, ...]) -> None:
    """The middle is the centre of mass of the derivative of a linear network with equal weights."""
    network = nn.Sequential(*layers)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.ones_(module.weight)
    image = torch.rand(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
    linear = nn.Sequential(*(nn.AvgPool2d(3, 2, 1) if type(m) is nn.MaxPool2d else m for m in network)).double()
    with Recorder(linear, image) as recorder:
        result = linear(image)
    y, x = result.shape[2] // 2, result.shape[3] // 2 - 1
    gradients = [
        torch.autograd.grad(result[0, :, y + i, x + j].sum(), image, retain_graph=True)[0][0, 0]
        for i, j in itertools.product((0, 1), repeat=2)  # the mean of four pixels evens out rounding between two
    ]
    lines = torch.arange(40, dtype=torch.float64)
    centres = [[float(g.sum(1 - axis) @ lines / g.sum()) for axis in (0, 1)] for g in gradients]
    grid = recorder.grids[result]
    assert grid is not None
    expected = grid.to_image(torch.tensor([[y + 0.5, x + 0.5]], dtype=torch.float64))[0].tolist()
    tolerance = 0.51 if any(isinstance(m, nn.ConvTranspose2d) for m in layers) else 0.01
    assert [sum(c) / 4 for c in zip(*centres)] == pytest.approx(expected, abs=tolerance)


WITHOUT_LOCATION = [
    lambda x: x.flip(-1),
    lambda x: torch.roll(x, 1, dims=2),
    lambda x: x.rot90(2, (2, 3)),
    lambda x: x.repeat(1, 1, 2, 1),
    lambda x: x.index_select(3, torch.tensor([4, 1, 2, 3])),
    lambda x: x[:, :, [5, 1, 0, 2]],
    lambda x: x.reshape(x.shape[0] * 4, x.shape[1], 4, 4),
    lambda x: nn.functional.grid_sample(x, torch.zeros(1, 4, 4, 2), align_corners=False),
]


@pytest.mark.parametrize("operation", WITHOUT_LOCATION)
def test_a_map_that_cannot_be_located_is_an_error(operation) -> None:
    """Use a node in the map, and a node that can be located with a convolution on the map in its stack."""
    network = Network(
        lambda net, x: net.end((x := net.first(x)) + net.lost(operation(x)).mean()),
        first=nn.Conv2d(1, 1, 3, padding=1),
        lost=nn.Conv2d(1, 1, 3),
        end=nn.Identity(),
    )
    image = torch.rand(1, 8, 8)
    for run in (
        lambda: LayerNode("lost", 1, 1).position(network, image),
        lambda: LayerNode.at(network, image, "lost", 1, 1),
        lambda: sampling_locations(network, image, ("lost", 1, 1)),
    ):
        with pytest.raises(ArgumentError, match="node must have a place in the image, the map of 'lost' cannot be"):
            run()
    for view in (sampling_locations, effective_sampling_locations):
        with pytest.raises(ArgumentError, match="maps with a place in the image, the input of 'lost' cannot be"):
            view(network, image, ("end", 1, 1))
    assert LayerNode("end", 1, 2).position(network, image) == (1, 2)
    assert sampling_locations(network, image, ("end", 1, 2), layers=["first"]).layers == ["first"]


def test_indices_of_a_pooling_lie_where_its_values_do() -> None:
    with Recorder(nn.Identity(), image := torch.rand(1, 1, 32, 32)) as recorder:
        values, indices = nn.functional.max_pool2d(image, 3, stride=2, padding=1, return_indices=True)
    assert recorder.grids[values] == recorder.grids[indices] == ((2, 2), (0, 0))


@pytest.mark.slow
def test_transformers_with_windows() -> None:
    """A Swin transformer has the channels last and merges every second pixel of four maps."""
    network = torchvision.models.swin_t(weights=None)
    assert LayerNode("permute", 0, 1).position(network, torch.rand(3, 64, 64)) == (15.5, 47.5)
    with pytest.raises(ArgumentError, match=r"the map of 'features\.1\.0' cannot be located: it is no map"):
        LayerNode("features.1.0", 0, 1).position(network, torch.rand(3, 64, 64))


@pytest.mark.parametrize("size", [32, 30, 46, 61])
def test_a_skip_connection_restores_the_exact_grid(size: int) -> None:
    def forward(net: Network, x: Tensor) -> Tensor:
        fine = net.down(x)
        low = nn.functional.max_pool2d(net.low(nn.functional.max_pool2d(fine, 2)), 2)
        coarse = nn.functional.interpolate(low, size=fine.shape[2:], mode="bilinear")
        return net.up(torch.cat([coarse, fine], 1))

    down, low, up = (nn.Conv2d(channels, 2, 3, padding=1) for channels in (1, 2, 4))
    network = Network(forward, down=down, low=low, up=up)
    image = torch.rand(1, size, size)
    node = LayerNode("up", size // 2, size // 2)
    assert node.position(network, image) == (size // 2, size // 2)
    points = sampling_locations(network, image, node)
    assert points.layers == ["down"] and len(points.positions) == 25
    assert points.positions.mean(0).tolist() == [size // 2, size // 2]


def test_an_index_from_the_image_does_not_locate_what_it_selects() -> None:
    other = torch.rand(16, 3, 4, 4)
    with Recorder(nn.Identity(), image := torch.rand(1, 1, 4, 4)) as recorder:
        result = other[image.flatten().argsort(), :, 1:3, None]
    assert result.shape == (16, 3, 2, 1, 4) and recorder.grids[result] is None and result not in recorder.grids


def test_shuffled_channels_keep_their_location() -> None:
    network = torchvision.models.shufflenet_v2_x0_5(weights=None)
    points = sampling_locations(network, torch.rand(3, 64, 64), ("stage3.2.branch2.3", 2, 1), depth=1)
    assert points.positions.mean(0).tolist() == [32, 16]


@pytest.mark.slow
@pytest.mark.parametrize("pool", [None, torchvision.ops.RoIPool(7, 0.25)])
def test_pooled_regions_have_no_location(pool: nn.Module | None) -> None:
    """Convolutions on them are ignored unless `layers` names them."""
    detector = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    heads = detector.roi_heads
    heads.box_roi_pool = MultiScaleDeformRoIPool(["0", "1"], DeformRoIPool(7))

    def respond(model: nn.Module, images: Tensor) -> Tensor:
        features, boxes = detector.backbone(images), [torch.tensor([[2.0, 3, 40, 50]])]
        pooled = heads.mask_roi_pool(features, boxes, [(64, 64)]) if pool is None else pool(features["0"], boxes)
        return heads.mask_head(pooled).flatten(1)

    with pytest.raises(ArgumentError, match=r"the input of 'roi_heads\.mask_head\.3\.0' cannot be located: it is no"):
        effective_sampling_locations(detector, torch.rand(3, 64, 64), respond, layers=["roi_heads.mask_head.3.0"])
    points = effective_sampling_locations(detector, torch.rand(3, 64, 64), respond, depth=2)
    assert all(name.startswith("backbone") for name in points.layers)


def test_a_pixel_after_pooling_of_two_lies_between_two_pixels() -> None:
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(1, 1, 3, padding=1))
    points = sampling_locations(network, torch.rand(1, 20, 20), ("2", 4, 4), layers=["2"])
    assert sorted({y for y, _ in as_dict(points)}) == [6.5, 8.5, 10.5]
