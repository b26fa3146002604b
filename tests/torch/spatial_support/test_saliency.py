"""Receptive fields, compared with autograd, and saliency regions, compared with known ones."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from dcnops import ArgumentError
from dcnops.adapters.torch import DeformConv2dPack, ModulatedDeformConv2dPack
from dcnops.adapters.torch.spatial_support import (
    LayerNode,
    RoINode,
    effective_receptive_field,
    error_bounded_saliency_region,
)
from tests.torch.spatial_support.networks import randomise_branches, small_detector


class TestReceptiveField:
    def test_is_the_gradient(self) -> None:
        torch.manual_seed(6)
        layers = DeformConv2dPack(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3)
        network = randomise_branches(nn.Sequential(*layers))
        image = torch.rand(3, 14, 14)
        field = effective_receptive_field(network, image, LayerNode("2", 4, 6))
        leaf = image[None].clone().requires_grad_()
        network(leaf)[0, :, 4, 6].norm().backward()
        assert leaf.grad is not None
        assert torch.equal(field, leaf.grad[0].abs().sum(0))

    def test_of_a_region_is_the_gradient_of_its_score(self) -> None:
        torch.manual_seed(7)
        detector = small_detector()
        image = torch.rand(3, 64, 64)
        field = effective_receptive_field(detector, image, RoINode((10, 10, 40, 50), 2))
        detector.eval()
        leaf = image[None].clone().requires_grad_()
        boxes = [torch.tensor([[10.0, 10, 40, 50]])]
        pooled = detector.roi_heads.box_roi_pool(detector.backbone(leaf), boxes, [(64, 64)])
        score = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))[0][0, 2]
        (gradient,) = torch.autograd.grad(score.abs(), leaf)
        assert torch.allclose(field, gradient[0].abs().sum(0))
        assert field.max() > 0

    def test_of_a_constant_is_zero(self) -> None:
        def constant(model: nn.Module, images: Tensor) -> Tensor:
            return images.new_ones(1, 3)

        assert not effective_receptive_field(nn.Identity(), torch.rand(1, 5, 6), constant).any()


class TestSaliencyRegion:
    def test_finds_a_known_receptive_field(self) -> None:
        network = nn.Conv2d(2, 3, (3, 5), bias=False)
        image = torch.rand(2, 21, 24) + 0.5
        region = error_bounded_saliency_region(network, image, ("", 8, 9), bound=1e-4, cell=1)
        expected = torch.zeros(21, 24, dtype=torch.bool)
        expected[8:11, 9:14] = True
        assert torch.equal(region.mask, expected)
        assert region.finished

    def test_finds_separate_parts(self) -> None:
        layer = DeformConv2dPack(1, 1, (1, 2), bias=False)
        layer.conv_offset.bias.data = torch.tensor([-3.0, -3, 5, 6])
        nn.init.ones_(layer.weight)
        region = error_bounded_saliency_region(layer, torch.rand(1, 16, 16) + 0.5, ("", 7, 7), bound=1e-4, cell=1)
        assert region.mask.nonzero().tolist() == [[4, 4], [12, 14]]

    @pytest.mark.parametrize("bias", [0.0, -4.5, 100.0])
    def test_does_not_depend_on_a_bias(self, bias: float) -> None:
        """A response near zero, as a class score can be, or a large one: relative to them, nothing or all is kept."""
        network = nn.Conv2d(1, 1, 3).requires_grad_(False)
        nn.init.constant_(network.weight, 0.5)
        nn.init.constant_(network.bias, bias)  # type: ignore[arg-type]
        image = torch.ones(1, 24, 24)
        region = error_bounded_saliency_region(network, image, ("", 9, 12), bound=0.1, cell=1)
        expected = torch.zeros(24, 24, dtype=torch.bool)
        expected[9:12, 12:15] = True
        assert torch.equal(region.mask, expected)
        assert region.finished

    @pytest.mark.parametrize("bound", [0.05, 0.3])
    @pytest.mark.parametrize("budget", [20, 100000])
    def test_keeps_the_bound_and_never_grows(self, bound: float, budget: int) -> None:
        torch.manual_seed(8)
        layers = ModulatedDeformConv2dPack(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3)
        network = randomise_branches(nn.Sequential(*layers))
        image, node = torch.randn(3, 33, 30), LayerNode("2", 12, 12)
        region = error_bounded_saliency_region(network, image, node, bound=bound, budget=budget, cell=3)
        with torch.no_grad():
            whole, kept, empty = (node(network, image[None] * mask) for mask in (1, region.mask, 0))
        assert float((whole - kept).norm() / (whole - empty).norm()) == pytest.approx(region.error, abs=1e-5)
        assert region.error <= bound
        assert region.areas == sorted(region.areas, reverse=True)
        assert region.areas[0] == 33 * 30 and region.areas[-1] == region.mask.sum()
        assert region.forwards <= budget
        assert region.finished is (budget > 20)

    def test_does_not_depend_on_the_batch_size(self) -> None:
        # In float64, so that rounding, which depends on the batch size, decides nothing.
        network, image = nn.Conv2d(1, 2, 5).double(), torch.rand(1, 20, 20, dtype=torch.float64)
        one, other = (
            error_bounded_saliency_region(network, image, ("", 5, 5), batch_size=size, cell=2) for size in (1, 7)
        )
        assert torch.equal(one.mask, other.mask) and one.forwards == other.forwards

    def test_shows_a_bar_on_request(self, capsys: pytest.CaptureFixture[str]) -> None:
        network, image = nn.Conv2d(1, 2, 3), torch.rand(1, 9, 9)
        error_bounded_saliency_region(network, image, ("", 3, 3), progress=True)
        assert "% of the image" in capsys.readouterr().err
        error_bounded_saliency_region(network, image, ("", 3, 3))
        assert not capsys.readouterr().err

    def test_of_a_single_number(self) -> None:
        network, image = nn.Conv2d(1, 2, 3), torch.rand(1, 9, 9)
        numbers = error_bounded_saliency_region(network, image, lambda model, images: model(images)[:, 1, 3, 3])
        maps = error_bounded_saliency_region(network, image, lambda model, images: model(images)[:, 1:, 3:4, 3:4])
        assert torch.equal(numbers.mask, maps.mask)

    def test_errors(self) -> None:
        network, image = nn.Conv2d(1, 2, 3, bias=False), torch.rand(1, 9, 9)
        for bound in (1, -0.1, math.nan, "a"):
            with pytest.raises(ArgumentError, match=rf"bound must be a number in \[0, 1\), got {bound!r}"):
                error_bounded_saliency_region(network, image, ("", 3, 3), bound=bound)  # type: ignore[arg-type]
        for name, value in itertools.product(("budget", "cell", "batch_size"), (0, 2.5, "a")):
            with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1, got {value!r}"):
                error_bounded_saliency_region(network, image, ("", 3, 3), **{name: value})  # type: ignore[arg-type]
        empty = r"node must respond to the image, its response differs by 0\.0 from that to an empty image"
        with pytest.raises(ArgumentError, match=empty):
            error_bounded_saliency_region(network, torch.zeros(1, 9, 9), ("", 3, 3))
