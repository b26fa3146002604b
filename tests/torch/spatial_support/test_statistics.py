"""Statistics of offsets and masks, compared with known values."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from dcnops.adapters.torch import (
    DeformConv2dPack,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    MultiScaleDeformRoIPool,
)
from dcnops.adapters.torch.spatial_support import OffsetObserver, offset_statistics
from tests.torch.spatial_support.networks import Network, randomise_branches, small_detector


def test_convolutions() -> None:
    layer = ModulatedDeformConv2dPack(2, 4, (1, 2), deform_groups=2)
    layer.conv_offset.bias.data[:8] = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 100])
    layer.conv_offset.bias.data[8:] = torch.logit(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    found = offset_statistics(layer, torch.rand(2, 20, 21))[""]
    assert found.unit == "pixels"
    assert torch.unique(found.offsets, dim=0).tolist() == [[1, 2], [3, 4], [5, 6], [7, 100]]
    assert found.masks is not None
    assert sorted(set(found.masks.tolist())) == pytest.approx([0.1, 0.2, 0.3, 0.4], rel=1e-5)
    assert found.lengths.max() == pytest.approx(math.hypot(7, 100))
    # Of 20 rows of the output, 1, 3, 5 and 7 lie below the map; of the columns 1, 4 (the tap adds 1), 5 and all.
    inside = [19 * 19, 17 * 16, 15 * 15, 0]
    assert found.outside == pytest.approx(1 - sum(inside) / (4 * 400))


def test_poolings() -> None:
    pool = DeformRoIPoolPack(2, 3, 8, spatial_scale=0.25, gamma=0.5)
    pool.offset_fc[-1].bias.data = torch.tensor([0.0, 0, 0, 8, 1, 1, 1, 1])  # x of all bins, then y

    rois = torch.tensor([[0.0, 0, 0, 16, 16]])
    network = Network(lambda net, images: net.pool(nn.functional.avg_pool2d(images, 4), rois), pool=pool)
    found = offset_statistics(network, [torch.rand(3, 64, 64)] * 2)["pool"]
    assert found.unit == "regions" and found.masks is None
    assert found.offsets.tolist() == [[0.5, 0], [0.5, 0], [0.5, 0], [0.5, 4]] * 2
    assert found.outside == 0.25


def test_detectors_and_regular_networks() -> None:
    detector = small_detector(min_size=64, max_size=96)
    assert offset_statistics(detector, torch.rand(3, 64, 64)) == {}
    pool = DeformRoIPoolPack(7, 256, 16)
    detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], pool)
    assert list(offset_statistics(detector, torch.rand(3, 64, 64))) == ["roi_heads.box_roi_pool.pools.0"]


def test_an_observer_does_not_affect_training() -> None:
    torch.manual_seed(9)
    network = randomise_branches(nn.Sequential(DeformConv2dPack(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)))
    other = copy.deepcopy(network)
    images = torch.rand(2, 3, 9, 9)
    with OffsetObserver(network) as observer:
        loss = network(images).square().mean()
    loss.backward()
    other(images).square().mean().backward()
    assert network.training
    for one, two in zip(network.parameters(), other.parameters()):
        assert torch.equal(one.grad, two.grad)  # type: ignore[arg-type]
    assert list(observer.statistics()) == ["0"]
    assert len(observer.statistics()["0"].offsets) == 2 * 9 * 49
