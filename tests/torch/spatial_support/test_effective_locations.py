"""The effect of sampling points and bins, compared with differences and with gradients of the operations."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcnops.adapters.torch import (
    DeformConv2dPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
    convert_to_deformable,
    deform_conv2d,
    deform_roi_pool,
)
from dcnops.adapters.torch.spatial_support import (
    RoINode,
    effective_bin_locations,
    effective_sampling_locations,
    sampling_locations,
)
from tests.torch.spatial_support.networks import as_dict, randomise_branches, small_detector


class TestEffectiveSamplingLocations:
    def test_one_layer_gives_the_gradient_of_the_offsets(self) -> None:
        torch.manual_seed(1)
        layer = randomise_branches(ModulatedDeformConv2dPack(4, 6, 3, stride=2, padding=1, deform_groups=2))
        image = torch.randn(1, 4, 15, 14)
        points = effective_sampling_locations(layer, image, ("", 3, 2))
        offset, logits = layer.conv_offset(image).detach().split((36, 18), 1)
        offset.requires_grad_()
        result = deform_conv2d(image, offset, layer.weight, layer.bias, 2, 1, 1, logits.sigmoid())
        (gradient,) = torch.autograd.grad(result[0, :, 3, 2].norm(), offset)
        lengths = gradient[0, :, 3, 2].reshape(18, 2).norm(dim=1)
        assert len(points.strength) == 18
        assert torch.allclose(points.strength.float(), lengths.sort(descending=True).values, rtol=1e-4)

    @pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
    def test_a_stack_gives_the_difference_that_a_moved_point_makes(self, kind: type[DeformConv2dPack]) -> None:
        """The offsets above depend on the samples below and contribute to the difference."""
        torch.manual_seed(2)
        network = randomise_branches(
            nn.Sequential(kind(2, 3, 3, padding=1), nn.Tanh(), kind(3, 4, 3, padding=1))
        ).double()
        image = torch.randn(1, 2, 9, 9, dtype=torch.float64)
        moved = torch.zeros(2, dtype=torch.float64)
        pixel = (4, 5)

        def move(module: nn.Module, args: Any, values: Tensor) -> Tensor:
            values = values.clone()
            values[0, 2 * 3 : 2 * 3 + 2, pixel[0], pixel[1]] += moved
            return values

        points = effective_sampling_locations(network, image, ("2", 4, 4), depth=None)
        hook = network[0].conv_offset.register_forward_hook(move)
        slopes = []
        with torch.no_grad():
            for axis in (0, 1):
                values = []
                for step in (1e-5, -1e-5):
                    moved.zero_()[axis] = step
                    values.append(float(network(image)[0, :, 4, 4].norm()))
                slopes.append((values[0] - values[1]) / 2e-5)
        hook.remove()
        offset = network[0].conv_offset(image)[0, 6:8, pixel[0], pixel[1]].detach()
        position = torch.tensor([pixel[0] - 1 + 1, pixel[1] - 1 + 0], dtype=torch.float64) + offset
        distance = (points.positions - position).norm(dim=1) + (points.layer != points.layers.index("0"))
        assert distance.min() < 1e-9
        assert points.strength[distance.argmin()] == pytest.approx(math.hypot(*slopes), rel=1e-5)

    def test_regular_and_converted_networks_agree(self) -> None:
        torch.manual_seed(3)
        regular = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 3, stride=2)).double()
        converted = copy.deepcopy(regular)
        convert_to_deformable(converted, "[02]", modulated=False)
        converted.double()
        image = torch.rand(1, 16, 16, dtype=torch.float64)
        for view in (sampling_locations, effective_sampling_locations):
            one, other = (as_dict(view(network, image, ("2", 3, 3))) for network in (regular, converted))
            assert one.keys() == other.keys()
            assert list(one.values()) == pytest.approx(list(other.values()))

    def test_strength_is_per_pixel_of_the_image(self) -> None:
        plain = nn.Sequential(nn.Conv2d(1, 1, 3))
        pooled = nn.Sequential(nn.Upsample(scale_factor=0.5, mode="nearest"), plain[0])
        image = torch.rand(1, 8, 8)
        stretched = image.repeat_interleave(2, 1).repeat_interleave(2, 2)
        one = effective_sampling_locations(plain, image, ("0", 2, 2))
        other = effective_sampling_locations(pooled, stretched, ("1", 2, 2))
        assert torch.allclose(one.strength, 2 * other.strength)
        assert torch.allclose(2 * one.positions + 0.5, other.positions)


class TestBins:
    @pytest.mark.parametrize("kind", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
    def test_boxes_and_strength(self, kind: type[DeformRoIPoolPack]) -> None:
        torch.manual_seed(4)
        pool = randomise_branches(kind(3, 2, 8, spatial_scale=0.5, gamma=0.3)).double()
        region = (6.0, 4, 22, 28)

        def respond(model: nn.Module, images: Tensor) -> Tensor:
            maps = nn.functional.avg_pool2d(images, 2)
            return model(maps, images.new_tensor([[0, *region]])).flatten(1)

        image = torch.rand(2, 40, 40, dtype=torch.float64)
        bins = effective_bin_locations(pool, image, respond)
        maps = nn.functional.avg_pool2d(image[None], 2)
        rois = image.new_tensor([[0, *region]])
        values = pool.run_branch(maps, rois).detach()
        offset = values[:, :2].clone().requires_grad_()
        mask = values[:, 2].sigmoid() if values.shape[1] == 3 else None
        for p, q in itertools.product(range(3), repeat=2):
            dx, dy = (0.3 * values[0, :2, p, q]).tolist()
            x1, y1 = 6 + 16 * (q / 3 + dx), 4 + 24 * (p / 3 + dy)
            assert bins.boxes[p, q].tolist() == pytest.approx([x1, y1, x1 + 16 / 3, y1 + 24 / 3])
        pooled = deform_roi_pool(maps, rois, offset, mask, output_size=3, spatial_scale=0.5, gamma=0.3)
        (gradient,) = torch.autograd.grad(pooled.norm(), offset)
        # An offset of 1 moves a bin by gamma times the region's sides.
        expected = torch.hypot(gradient[0, 0] / (0.3 * 16), gradient[0, 1] / (0.3 * 24))
        assert torch.allclose(bins.strength, expected) or kind is ModulatedDeformRoIPoolPack
        if mask is not None:
            assert bins.mask is not None
            assert torch.allclose(bins.mask, mask[0])

    @pytest.mark.slow
    def test_detector(self) -> None:
        torch.manual_seed(5)
        detector = small_detector()
        image = torch.rand(3, 96, 128)
        theirs = effective_bin_locations(detector, image, RoINode((16, 8, 72, 50), 2))
        detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], DeformRoIPool(7))
        ours = effective_bin_locations(detector, image, ((16, 8, 72, 50), 2))
        assert ours.boxes[0, 0].tolist() == [16, 8, 24, 14]
        assert ours.boxes[-1, -1].tolist() == [64, 44, 72, 50]
        # torchvision's RoIAlign is shifted by half a pixel of the map, which has a stride of 32.
        assert torch.allclose(theirs.boxes, ours.boxes + 16)
        assert (ours.strength > 0).any() and ours.mask is None
        feature = effective_bin_locations(detector, image, ((16, 8, 72, 50), 7, "features"))
        assert not torch.equal(feature.strength, ours.strength)

    @pytest.mark.slow
    def test_convolutions_of_the_box_head_have_no_location(self) -> None:
        detector = torchvision.models.detection.fasterrcnn_resnet50_fpn_v2(
            weights=None, weights_backbone=None, num_classes=4
        )
        detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["0", "1"], DeformRoIPool(7))
        points = effective_sampling_locations(detector, torch.rand(3, 64, 64), ((8, 8, 40, 40), 1), depth=2)
        # The path leads from the finest level of the pyramid down the backbone.
        assert points.layers == ["backbone.fpn.layer_blocks.0.0", "backbone.body.layer1.2.conv2"]
