"""Spatial support: the views against enumeration, autograd, finite differences and networks with known answers."""

from __future__ import annotations

import copy
import doctest
import importlib
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchvision
from dcnops.adapters.torch import (
    DeformConv2d,
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
from dcnops.adapters.torch.support import (
    LayerNode,
    OffsetObserver,
    RoINode,
    effective_bin_locations,
    effective_receptive_field,
    effective_sampling_locations,
    error_bounded_saliency_region,
    offset_statistics,
    sampling_locations,
)
from dcnops.adapters.torch.support.recording import Recorder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcnops import ArgumentError, ShapeError

Points = dict[tuple[float, float], float]


def wake(model: nn.Module, deviation: float = 1.0) -> nn.Module:
    """Give all branches random weights, so that offsets and masks depend on the image."""
    for module in model.modules():
        branch = getattr(module, "conv_offset", None) or getattr(module, "offset_fc", None)
        if branch is not None:
            for parameter in branch.parameters():
                nn.init.normal_(parameter, std=deviation / math.sqrt(parameter[0].numel()))
    return model


def as_dict(points: Any) -> Points:
    return {(y, x): s for (y, x), s in zip(points.positions.tolist(), points.strength.tolist())}


def assert_same(found: Points, expected: Points) -> None:
    """The same strength around the same places."""
    total: dict[tuple[int, int], float] = defaultdict(float)
    for points, sign in ((found, 1), (expected, -1)):
        for (y, x), strength in points.items():
            total[(round(y * 100), round(x * 100))] += sign * strength
    # A place at the edge of a rounding interval may be counted in the neighbouring one.
    for (y, x), rest in total.items():
        around = sum(total.get((y + i, x + j), 0) for i, j in itertools.product((-1, 0, 1), repeat=2))
        assert abs(rest) < 1e-4 or abs(around) < 1e-4, (y, x, rest)


class Enumeration:
    """Every path through a stack of deformable layers, one after the other, in plain Python."""

    def __init__(self, layers: Sequence[ModulatedDeformConv2dPack | DeformConv2dPack], image: Tensor) -> None:
        self.layers = layers
        self.seen: list[tuple[Tensor, Tensor | None]] = []
        self.sizes: list[tuple[int, int]] = []
        x = image
        for layer in layers:
            values = layer.conv_offset(x)
            points = values.shape[1] // (3 if isinstance(layer, ModulatedDeformConv2dPack) else 2)
            mask = None
            if isinstance(layer, ModulatedDeformConv2dPack):
                mask = layer.mask_scale * values[0, 2 * points :].sigmoid()
            self.seen.append((values[0, : 2 * points], mask))
            self.sizes.append((x.shape[2], x.shape[3]))
            x = layer(x)
        self.out = x

    def paths(self, y: int, x: int, strength: float = 1.0, level: int | None = None) -> Points:
        level = len(self.layers) - 1 if level is None else level
        layer, (offset, mask), (height, width) = self.layers[level], self.seen[level], self.sizes[level]
        kh, kw = layer.kernel_size
        found: Points = defaultdict(float)
        for group in range(layer.deform_groups):
            for i, j in itertools.product(range(kh), range(kw)):
                k = group * kh * kw + i * kw + j
                py = y * layer.stride[0] - layer.padding[0] + i * layer.dilation[0] + float(offset[2 * k, y, x])
                px = x * layer.stride[1] - layer.padding[1] + j * layer.dilation[1] + float(offset[2 * k + 1, y, x])
                weight = strength * (1 if mask is None else float(mask[k, y, x]))
                if level == 0:
                    found[(py, px)] += weight
                    continue
                for r, s in itertools.product(
                    (math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)
                ):
                    share = (1 - abs(py - r)) * (1 - abs(px - s))
                    if 0 <= r < height and 0 <= s < width and share > 0:
                        for place, each in self.paths(r, s, weight * share, level - 1).items():
                            found[place] += each
        return found


@st.composite
def stacks(draw: st.DrawFn, depth: int) -> tuple[nn.Sequential, Tensor, int, int]:
    """A stack of deformable layers of all kinds, an image and a pixel of the last map."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
    channels = 2
    for _ in range(depth):
        numbers = {
            "kernel_size": draw(st.sampled_from([2, 3, (1, 3)] if depth == 2 else [2, (2, 1)])),
            "stride": draw(st.sampled_from([1, 2, (1, 2)])),
            "padding": draw(st.sampled_from([0, 1, (1, 2)])),
            "dilation": draw(st.sampled_from([1, 2])),
            "groups": draw(st.sampled_from([1, 2])),
            "deform_groups": draw(st.sampled_from([1, 2])),
        }
        kind = draw(st.sampled_from([DeformConv2dPack, ModulatedDeformConv2dPack]))
        layers.append(kind(channels, 2, **numbers))
    network = nn.Sequential(*layers).double()
    wake(network, draw(st.sampled_from([0.3, 1.5])))
    image = torch.randn(1, channels, 14, 15, dtype=torch.float64)
    height, width = network(image).shape[2:]
    return network, image, draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))


class Branched(nn.Module):
    """Layers of 1x3 that take sums of earlier results, and remember what their branches gave."""

    def __init__(self, sources: Sequence[set[int]]) -> None:
        super().__init__()
        self.sources = sources
        self.layers = nn.ModuleList(ModulatedDeformConv2dPack(2, 2, (1, 3), padding=(0, 1)) for _ in sources[1:])
        self.end = nn.Identity()
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        results, seen = {-1: image}, []
        for number, sources in enumerate(self.sources):
            x = sum(results[source] for source in sources)
            assert isinstance(x, Tensor)
            if number == len(self.layers):
                break
            results[number] = self.layers[number](x)
            seen.append(self.layers[number].conv_offset(x).detach())
        self.seen = seen
        return self.end(x)


class TestSamplingLocations:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 3).flatmap(stacks))
    def test_is_the_enumeration_of_all_paths(self, drawn: tuple[nn.Sequential, Tensor, int, int]) -> None:
        network, image, y, x = drawn
        with torch.no_grad():
            expected = Enumeration(list(network), image).paths(y, x)  # type: ignore[arg-type]
        points = sampling_locations(network, image, (f"{len(network) - 1}", y, x), depth=len(network))
        assert_same(as_dict(points), expected)
        assert points.strength.sum() == pytest.approx(sum(expected.values()))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_is_the_enumeration_of_all_paths_through_branches_and_shortcuts(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(2, 4))
        # What the inputs of the layers, and the node at the end, are the sums of: the image (-1) and earlier layers.
        sources = [
            data.draw(st.sets(st.integers(-1, number - 1), min_size=1), label=f"sources of {number}")
            for number in range(count + 1)
        ]
        if sources[-1] == {-1}:
            sources[-1] = {0}
        depth = data.draw(st.integers(1, 4))
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        network = wake(Branched(sources)).double()
        image = torch.rand(1, 2, 8, 8, dtype=torch.float64)
        with torch.no_grad():
            network(image)

        def steps(above: int, below: int) -> int:
            """The longest way, in layers; 0 if there is none."""
            further = [way for source in sources[above] if source >= 0 and (way := steps(source, below))]
            return max(further) + 1 if further else int(below in sources[above])

        longest = {(a, b): steps(a, b) for a in range(count + 1) for b in range(a)}
        expected: dict[str, Points] = defaultdict(lambda: defaultdict(float))

        def follow(above: int, y: int, x: int, strength: float, left: int) -> None:
            for below in (b for b in range(above) if longest[above, b] == 1):
                values = network.seen[below]
                for k in range(3):
                    py = y + float(values[0, 2 * k, y, x])
                    px = x - 1 + k + float(values[0, 2 * k + 1, y, x])
                    weight = strength * float(values[0, 6 + k, y, x].sigmoid())
                    if left == 1 or not any(longest[below, b] for b in range(below)):
                        expected[f"layers.{below}"][(py, px)] += weight
                        continue
                    for r, s in itertools.product(
                        (math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)
                    ):
                        share = (1 - abs(py - r)) * (1 - abs(px - s))
                        if 0 <= r < 8 and 0 <= s < 8 and share > 0:
                            follow(below, r, s, weight * share, left - 1)

        follow(count, 3, 4, 1.0, depth)
        points = sampling_locations(network, image, ("end", 3, 4), depth=depth)
        assert set(points.layers) == set(expected)
        for index, name in enumerate(points.layers):
            chosen = points.layer == index
            found = points._replace(positions=points.positions[chosen], strength=points.strength[chosen])
            assert_same(as_dict(found), expected[name])

    def test_parallel_branches_are_side_by_side(self) -> None:
        pooling = torchvision.models.segmentation.deeplabv3.ASPP(2, [2, 3], 4)
        network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), pooling)
        points = sampling_locations(network, torch.rand(1, 21, 21), ("1", 10, 10), depth=1)
        assert points.layers == ["1.convs.2.0", "1.convs.1.0"]
        for index, dilation in enumerate((3, 2)):
            around = itertools.product((-dilation, 0, dilation), repeat=2)
            assert {(y - 10, x - 10) for y, x in points.positions[points.layer == index].tolist()} == set(around)
        assert points.strength.tolist() == [1] * 18
        together = effective_sampling_locations(network, torch.rand(1, 21, 21), ("1", 10, 10), depth=2)
        assert together.layers == ["1.convs.2.0", "1.convs.1.0", "0"]

    def test_pixels_are_found_again_on_grids_of_odd_scales(self) -> None:
        there_and_back = nn.Sequential(nn.Upsample((36, 36), mode="bilinear"), nn.AvgPool2d(3))
        network = nn.Sequential(
            nn.AdaptiveAvgPool2d(12), nn.Conv2d(3, 2, 3, padding=1), there_and_back, nn.Conv2d(2, 2, 3, padding=1)
        )
        assert len(sampling_locations(network, torch.rand(3, 13, 13), ("3", 5, 5)).positions) == 25

    def test_points_lie_between_the_pixels_of_a_coarser_map(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(1, 1, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 3, padding=1)
        )
        points = sampling_locations(network, torch.rand(1, 16, 16), ("2", 10, 10), depth=None)
        # Rows 9 to 11 of the fine map are 4.25, 4.75 and 5.25 of the coarse one: rows 4, 5 and 6 with these weights.
        ways = nn.functional.conv1d(torch.tensor([[[1, 1.75, 0.25]]]), torch.ones(1, 1, 3), padding=2)[0, 0].tolist()
        assert as_dict(points) == {(3.0 + i, 3.0 + j): ways[i] * ways[j] for i in range(5) for j in range(5)}

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_of_regular_convolutions_is_the_plain_grid(self, depth: int) -> None:
        network = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)))
        points = as_dict(sampling_locations(network, torch.rand(2, 20, 21), ("3", 9, 11), depth=depth))
        ways = torch.ones(1)
        for _ in range(depth):
            ways = torch.conv1d(nn.functional.pad(ways, (2, 2))[None, None], torch.ones(1, 1, 3))[0, 0]
        around = range(-depth, depth + 1)
        assert points == {(9.0 + i, 11.0 + j): float(ways[i + depth] * ways[j + depth]) for i in around for j in around}

    def test_strides_and_dilations_of_regular_convolutions(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, (3, 1), dilation=2)
        )
        points = sampling_locations(network, torch.rand(1, 30, 30), ("2", 3, 4))
        rows = [2 * (3 + 2 * i) + k for i in range(3) for k in (-1, 0, 1)]
        assert as_dict(points) == {(float(row), 8.0 + k): 1.0 for row in rows for k in (-1, 0, 1)}

    def test_a_fixed_shift_moves_all_points(self) -> None:
        network = nn.Sequential(DeformConv2dPack(1, 1, 3, padding=1), DeformConv2dPack(1, 1, 3, padding=1))
        for layer, shift in zip(network, ([2.0, -1.0], [-0.5, 3.0])):
            layer.conv_offset.bias.data = torch.tensor(shift).repeat(9)
        points = sampling_locations(network, torch.rand(1, 30, 30), ("1", 12, 12))
        # Half a pixel lies between two rows of the first layer's map.
        centre = (points.positions * points.strength[:, None]).sum(0) / points.strength.sum()
        assert centre.tolist() == pytest.approx([12 + 1.5, 12 + 2.0])
        assert points.strength.sum() == pytest.approx(81)
        assert points.positions.amin(0).tolist() == [12 + 1.5 - 2.5, 12 + 2.0 - 2]

    def test_an_offset_can_be_a_dilation(self) -> None:
        layer = DeformConv2dPack(1, 1, 3, padding=1)
        taps = torch.tensor([(i, j) for i in (-1.0, 0, 1) for j in (-1.0, 0, 1)])
        layer.conv_offset.bias.data = taps.flatten()
        dilated = nn.Conv2d(1, 1, 3, padding=2, dilation=2)
        image = torch.rand(1, 20, 20)
        assert as_dict(sampling_locations(layer, image, ("", 7, 8))) == as_dict(
            sampling_locations(dilated, image, ("", 7, 8))
        )

    def test_masks_weaken_points(self) -> None:
        network = nn.Sequential(
            ModulatedDeformConv2dPack(1, 1, (1, 2)), ModulatedDeformConv2dPack(1, 1, (1, 2), mask_scale=2)
        )
        for layer, share in zip(network, ([0.25, 0.75], [0.5, 0.1])):
            layer.conv_offset.bias.data[4:] = torch.logit(torch.tensor(share))
        points = as_dict(sampling_locations(network, torch.rand(1, 4, 9), ("1", 1, 3)))
        expected = {(1.0, 3.0): 0.25, (1.0, 4.0): 0.75 + 0.2 * 0.25, (1.0, 5.0): 0.2 * 0.75}
        assert points.keys() == expected.keys()
        assert [points[key] for key in expected] == pytest.approx(list(expected.values()))

    def test_the_branches_are_no_layers_of_the_stack(self) -> None:
        class ByHand(nn.Module):
            """A layer as people write it with torchvision."""

            def __init__(self) -> None:
                super().__init__()
                self.offsets = nn.Conv2d(2, 18, 3, padding=1)
                self.conv = torchvision.ops.DeformConv2d(2, 2, 3, padding=1)

            def forward(self, x: Tensor) -> Tensor:
                return self.conv(x, self.offsets(x))

        network = nn.Sequential(ByHand(), ByHand())
        points = sampling_locations(network, torch.rand(2, 12, 12), ("1", 4, 4), depth=9)
        assert points.layers == ["0.conv"]
        effective = effective_sampling_locations(network, torch.rand(2, 12, 12), ("1", 4, 4), depth=None)
        assert effective.layers == ["1.conv", "0.conv"]

    def test_layers_of_torchvision_are_seen_as_ours(self) -> None:
        torch.manual_seed(0)
        image, offset = torch.rand(2, 12, 13), 2 * torch.randn(1, 36, 12, 13)
        mask = torch.rand(1, 18, 12, 13)

        class Given(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x, offset, mask)

        theirs = Given(torchvision.ops.DeformConv2d(2, 4, 3, padding=1))
        ours = Given(DeformConv2d(2, 4, 3, padding=1))
        ours.load_state_dict(theirs.state_dict())
        for view in (sampling_locations, effective_sampling_locations):
            one, other = (view(network, image, ("layer", 5, 6)) for network in (theirs, ours))
            assert torch.equal(one.positions, other.positions)
            assert torch.allclose(one.strength, other.strength)
            assert one.layers == other.layers == ["layer"]

    def test_layers_can_be_chosen(self) -> None:
        network = nn.Sequential(*(nn.Conv2d(1, 1, 3) for _ in range(3)))
        image, node = torch.rand(1, 12, 12), ("2", 2, 2)
        assert len(sampling_locations(network, image, node, layers=["2", "1"]).positions) == 25
        with pytest.raises(ArgumentError, match=r"layers must be .* among \['0', '1', '2'\], got \['3'\]"):
            sampling_locations(network, image, node, layers=["3"])
        for none in ([], "1"):
            with pytest.raises(ArgumentError, match="layers must be a sequence of names among"):
                effective_sampling_locations(network, image, node, layers=none)

    def test_the_strongest_are_kept(self) -> None:
        network = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)))
        points = sampling_locations(network, torch.rand(1, 12, 12), ("1", 6, 6), max_points=5)
        assert points.strength.tolist() == [9, 6, 6, 6, 6]
        assert points.positions[0].tolist() == [6, 6]

    def test_a_compiled_model_runs_as_it_was_written(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3))
        compiled = torch.compile(network, backend="eager")
        image = torch.rand(1, 9, 9)
        points = sampling_locations(compiled, image, ("_orig_mod.1", 1, 1))
        assert as_dict(points) == as_dict(sampling_locations(network, image, ("1", 1, 1)))

    def test_one_stage_detectors_run_their_backbone(self) -> None:
        detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        points = sampling_locations(detector, torch.rand(3, 64, 64), ("backbone.fpn.layer_blocks.0", 4, 4), depth=1)
        assert points.positions.mean(0).tolist() == [32, 32]

    def test_what_is_not_finite_is_left_out(self) -> None:
        layer = DeformConv2dPack(1, 1, 3, padding=1)
        layer.conv_offset.bias.data[:3] = torch.tensor([math.nan, 0, math.inf])
        assert len(sampling_locations(layer, torch.rand(1, 9, 9), ("", 4, 4)).positions) == 7

    def test_a_pyramid_is_followed_down_the_body(self) -> None:
        body = torchvision.models.resnet18(weights=None)
        backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(body, 5)
        calls = sampling_locations(backbone, torch.rand(3, 64, 64), ("fpn.layer_blocks.1", 3, 3), depth=3)
        assert calls.layers == ["body.layer2.1.conv1"]  # after layer2.1.conv2 and the pyramid's own
        assert calls.positions.mean(0).tolist() == pytest.approx([24, 24])


class Function(nn.Module):
    def __init__(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.function = name, function

    def extra_repr(self) -> str:
        return self.name

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


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
        (
            Function("last channels", lambda x: x[:, :, None].permute(0, 1, 3, 4, 2).permute(0, 1, 4, 2, 3)[0]),
            nn.ReLU(),
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
            features, boxes = detector.backbone(images), [torch.tensor([[2.0, 3, 40, 50], [1, 1, 9, 9]])]
            return head(heads.mask_roi_pool(features, boxes, [(64, 64)])).flatten(1)[:1]

        with pytest.raises(
            ArgumentError, match=r"the input of 'roi_heads\.mask_head\.3\.0' cannot be located: it is no map"
        ):
            effective_sampling_locations(detector, torch.rand(3, 64, 64), respond, depth=1)

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


class TestEffectiveSamplingLocations:
    def test_of_one_layer_is_the_gradient_of_the_offsets(self) -> None:
        torch.manual_seed(1)
        layer = wake(ModulatedDeformConv2dPack(4, 6, 3, stride=2, padding=1, deform_groups=2))
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
    def test_of_a_stack_is_the_difference_that_a_moved_point_makes(self, kind: type[DeformConv2dPack]) -> None:
        """Also by way of the offsets above, which depend on what is sampled below."""
        torch.manual_seed(2)
        network = wake(nn.Sequential(kind(2, 3, 3, padding=1), nn.Tanh(), kind(3, 4, 3, padding=1))).double()
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
                    moved.zero_()
                    moved[axis] = step
                    values.append(float(network(image)[0, :, 4, 4].norm()))
                slopes.append((values[0] - values[1]) / 2e-5)
        hook.remove()
        offset = network[0].conv_offset(image)[0, 6:8, pixel[0], pixel[1]].detach()
        place = torch.tensor([pixel[0] - 1 + 1, pixel[1] - 1 + 0], dtype=torch.float64) + offset
        distance = (points.positions - place).norm(dim=1) + (points.layer != points.layers.index("0"))
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

    def test_is_per_pixel_of_the_image(self) -> None:
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
        pool = wake(kind(3, 2, 8, spatial_scale=0.5, gamma=0.3)).double()
        region = (6.0, 4, 22, 28)

        def respond(model: nn.Module, images: Tensor) -> Tensor:
            maps = nn.functional.avg_pool2d(images, 2)
            return model(maps, images.new_tensor([[0, *region]])).flatten(1)

        image = torch.rand(2, 40, 40, dtype=torch.float64)
        bins = effective_bin_locations(pool, image, respond)
        maps = nn.functional.avg_pool2d(image[None], 2)
        rois = image.new_tensor([[0, *region]])
        values = pool._branch(maps, rois).detach()
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

    def test_of_a_detector(self) -> None:
        torch.manual_seed(5)
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4
        )
        image = torch.rand(3, 96, 128)
        theirs = effective_bin_locations(detector, image, RoINode((16, 8, 72, 50), 2))
        detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], DeformRoIPool(7))
        ours = effective_bin_locations(detector, image, ((16, 8, 72, 50), 2))
        assert ours.boxes[0, 0].tolist() == [16, 8, 24, 14]
        assert ours.boxes[-1, -1].tolist() == [64, 44, 72, 50]
        # RoIAlign of torchvision lies half a pixel of the map off, whose stride is 32.
        assert torch.allclose(theirs.boxes, ours.boxes + 16)
        assert (ours.strength > 0).any() and ours.mask is None
        unit = effective_bin_locations(detector, image, ((16, 8, 72, 50), 7, "unit"))
        assert not torch.equal(unit.strength, ours.strength)

    def test_needs_a_pooling(self) -> None:
        with pytest.raises(ArgumentError, match="there is none before it"):
            effective_bin_locations(nn.Conv2d(1, 1, 3), torch.rand(1, 9, 9), ("", 2, 2))


class TestReceptiveField:
    def test_is_the_gradient(self) -> None:
        torch.manual_seed(6)
        network = wake(nn.Sequential(DeformConv2dPack(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3)))
        image = torch.rand(3, 14, 14)
        field = effective_receptive_field(network, image, LayerNode("2", 4, 6))
        leaf = image[None].clone().requires_grad_()
        network(leaf)[0, :, 4, 6].norm().backward()
        assert leaf.grad is not None
        assert torch.equal(field, leaf.grad[0].abs().sum(0))

    def test_of_a_detector_is_that_of_its_score(self) -> None:
        torch.manual_seed(7)
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4
        )
        image = torch.rand(3, 64, 64)
        field = effective_receptive_field(detector, image, RoINode((10, 10, 40, 50), 2))
        detector.eval()
        leaf = image[None].clone().requires_grad_()
        pooled = detector.roi_heads.box_roi_pool(
            detector.backbone(leaf), [torch.tensor([[10.0, 10, 40, 50]])], [(64, 64)]
        )
        score = detector.roi_heads.box_predictor(detector.roi_heads.box_head(pooled))[0][0, 2]
        (gradient,) = torch.autograd.grad(score.abs(), leaf)
        assert torch.allclose(field, gradient[0].abs().sum(0))
        assert field.max() > 0

    def test_of_what_the_image_does_not_reach_is_zero(self) -> None:
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

    @pytest.mark.parametrize("bound", [0.05, 0.3])
    @pytest.mark.parametrize("budget", [20, 100000])
    def test_keeps_the_bound_and_never_grows(self, bound: float, budget: int) -> None:
        torch.manual_seed(8)
        network = wake(nn.Sequential(ModulatedDeformConv2dPack(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3)))
        image, node = torch.randn(3, 33, 30), LayerNode("2", 12, 12)
        region = error_bounded_saliency_region(network, image, node, bound=bound, budget=budget, cell=3)
        with torch.no_grad():
            whole, kept = node(network, image[None]), node(network, image[None] * region.mask)
        assert float((whole - kept).norm() / whole.norm()) == pytest.approx(region.error, abs=1e-5)
        assert region.error <= bound
        assert region.areas == sorted(region.areas, reverse=True)
        assert region.areas[0] == 33 * 30 and region.areas[-1] == region.mask.sum()
        assert region.forwards <= budget
        assert region.finished is (budget > 20)

    def test_the_batch_size_does_not_matter(self) -> None:
        network, image = nn.Conv2d(1, 2, 5), torch.rand(1, 20, 20)
        one, other = (
            error_bounded_saliency_region(network, image, ("", 5, 5), batch_size=size, cell=2) for size in (1, 7)
        )
        assert torch.equal(one.mask, other.mask) and one.forwards == other.forwards

    def test_a_bar_is_shown(self, capsys: pytest.CaptureFixture[str]) -> None:
        network, image = nn.Conv2d(1, 2, 3), torch.rand(1, 9, 9)
        error_bounded_saliency_region(network, image, ("", 3, 3), progress=True)
        assert "% of the image" in capsys.readouterr().err
        error_bounded_saliency_region(network, image, ("", 3, 3))
        assert not capsys.readouterr().err

    def test_errors(self) -> None:
        network, image = nn.Conv2d(1, 2, 3, bias=False), torch.rand(1, 9, 9)
        for bound in (1, -0.1, math.nan, "a"):
            with pytest.raises(ArgumentError, match=rf"bound must be a number in \[0, 1\), got {bound!r}"):
                error_bounded_saliency_region(network, image, ("", 3, 3), bound=bound)  # type: ignore[arg-type]
        for name, value in itertools.product(("budget", "cell", "batch_size"), (0, 2.5, "a")):
            with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1, got {value!r}"):
                error_bounded_saliency_region(network, image, ("", 3, 3), **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"node must respond to the image, its response has the norm 0\.0"):
            error_bounded_saliency_region(network, torch.zeros(1, 9, 9), ("", 3, 3))


class TestStatistics:
    def test_of_convolutions(self) -> None:
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

    def test_of_poolings(self) -> None:
        pool = DeformRoIPoolPack(2, 3, 8, spatial_scale=0.25, gamma=0.5)
        pool.offset_fc[-1].bias.data = torch.tensor([0.0, 0, 0, 8, 1, 1, 1, 1])  # x of all bins, then y

        class Pooling(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.pool = pool

            def forward(self, images: Tensor) -> Tensor:
                return self.pool(nn.functional.avg_pool2d(images, 4), torch.tensor([[0.0, 0, 0, 16, 16]]))

        found = offset_statistics(Pooling(), [torch.rand(3, 64, 64)] * 2)["pool"]
        assert found.unit == "regions" and found.masks is None
        assert found.offsets.tolist() == [[0.5, 0], [0.5, 0], [0.5, 0], [0.5, 4]] * 2
        assert found.outside == 0.25

    def test_of_a_detector_and_of_regular_networks(self) -> None:
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4, min_size=64, max_size=96
        )
        assert offset_statistics(detector, torch.rand(3, 64, 64)) == {}
        pool = DeformRoIPoolPack(7, 256, 16)
        detector.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["1"], pool)
        assert list(offset_statistics(detector, torch.rand(3, 64, 64))) == ["roi_heads.box_roi_pool.pools.0"]

    def test_an_observer_leaves_the_training_alone(self) -> None:
        torch.manual_seed(9)
        network = wake(nn.Sequential(DeformConv2dPack(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)))
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


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("in the middle")


def state_of(model: nn.Module) -> list[Any]:
    parts: list[Any] = [dict(model.state_dict())]
    for name, module in model.named_modules():
        hooks = [
            len(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
        ]
        parts.append((name, module.training, hooks, sorted(vars(module))))
    for parameter in model.parameters():
        parts.append((parameter.requires_grad, None if parameter.grad is None else parameter.grad.clone()))
    return copy.deepcopy(parts)


def same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_state, one, other))
    return bool(one == other)


VIEWS = [
    sampling_locations,
    effective_sampling_locations,
    effective_receptive_field,
    error_bounded_saliency_region,
    lambda model, image, node: offset_statistics(model, image),
]


class TestTheModelStaysAsItIs:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("fails", [False, True])
    def test_after_a_call(self, view: Any, fails: bool) -> None:
        torch.manual_seed(10)
        network = wake(
            nn.Sequential(
                ModulatedDeformConv2dPack(2, 4, 3, padding=1),
                nn.BatchNorm2d(4),
                nn.Dropout(0.5),
                nn.Conv2d(4, 4, 3, padding=1),
                Failing() if fails else nn.Identity(),
                nn.Conv2d(4, 3, 3),
            )
        )
        network[1].eval()
        network[3].requires_grad_(False)
        network[0].weight.grad = torch.ones_like(network[0].weight)
        image = torch.rand(2, 12, 12)
        before, random = state_of(network), torch.get_rng_state()
        with torch.no_grad():
            if fails:
                with pytest.raises(ValueError, match="in the middle"):
                    view(network, image, ("5", 3, 3))
            else:
                view(network, image, ("5", 3, 3))
            assert not torch.is_grad_enabled()
        assert same_state(state_of(network), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert not image.requires_grad
        network(image[None]) if not fails else None

    def test_a_model_may_change_its_input_in_place(self) -> None:
        torch.manual_seed(11)
        plain = wake(nn.Sequential(nn.ReLU(), DeformConv2dPack(2, 3, 3, padding=1), nn.Conv2d(3, 2, 3, bias=False)))
        hasty = copy.deepcopy(plain)
        hasty[0] = Function("", lambda x: x.sub_(0.2).mul_(2).relu_())
        plain[0] = Function("", lambda x: ((x - 0.2) * 2).relu())
        image = torch.rand(2, 12, 12)
        kept = image.clone()
        for view in (*VIEWS[:4], offset_statistics):
            rest = () if view is offset_statistics else (("2", 4, 5),)
            one, other = (view(network, image, *rest) for network in (hasty, plain))
            assert torch.equal(image, kept)
            if view is offset_statistics:
                one, other = ((found["1"].offsets,) for found in (one, other))
            assert same_state(*((tuple(found) if isinstance(found, tuple) else (found,)) for found in (one, other)))

    def test_an_observer_does_not_see_the_views(self) -> None:
        network, image = nn.Sequential(DeformConv2dPack(2, 3, 3), nn.Conv2d(3, 2, 3)), torch.rand(2, 9, 9)
        with OffsetObserver(network) as observer, OffsetObserver(network[0]) as inner:
            for view in VIEWS:
                view(network, image, ("1", 2, 2))
            LayerNode.at(network, image, "1", 2, 2)
            assert observer.statistics() == {}
            network(image[None])
        for each in (observer, inner):
            assert [len(found.offsets) for found in each.statistics().values()] == [9 * 49]

    def test_in_inference_mode(self) -> None:
        network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3))
        with torch.inference_mode():
            image = torch.rand(1, 9, 9)
            assert len(effective_sampling_locations(network, image, ("1", 2, 2)).positions) == 90
            assert effective_receptive_field(network, image, ("1", 2, 2)).shape == (9, 9)


class TestErrors:
    @pytest.mark.parametrize(
        ("node", "message"),
        [
            (("9", 1, 1), "node must name a layer of the model, got '9'"),
            (("1", 1, 1), "gives a map .* '1' gives tuple"),
            (("0", 1.0, 1), r"node must be in the map of '0', 7 rows and 7 columns, got y=1.0, x=1"),
            (("0", 7, 1), r"node must be in the map of '0', 7 rows and 7 columns, got y=7, x=1"),
            (("unused", 1, 1), "node must name a layer that runs for an image, 'unused' does not"),
            ("0", "node must be .* got '0'"),
            (("0", 1), r"node must be .* got \('0', 1\)"),
            (((1, 2, 3, 4), 1), "model must have backbone and roi_heads"),
        ],
    )
    def test_nodes(self, node: Any, message: str) -> None:
        class Odd(nn.Sequential):
            def __init__(self) -> None:
                super().__init__(nn.Conv2d(1, 1, 3), Pair())
                self.unused = nn.Conv2d(1, 1, 3)

            def forward(self, x: Tensor) -> Tensor:
                return self[1](self[0](x))[0]

        class Pair(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x, x

        with pytest.raises(ArgumentError, match=message):
            effective_receptive_field(Odd(), torch.rand(1, 9, 9), node)

    @pytest.mark.parametrize(
        "image", [torch.rand(9, 9), torch.rand(2, 1, 9, 9), torch.ones(1, 9, 9, dtype=torch.uint8)]
    )
    def test_images(self, image: Tensor) -> None:
        with pytest.raises(ShapeError, match="image must be"):
            effective_receptive_field(nn.Conv2d(1, 1, 3), image, ("", 1, 1))

    @pytest.mark.parametrize("box", [(1, 2, 3), (5, 1, 5, 9), (1, 1, float("nan"), 9)])
    def test_boxes(self, box: Any) -> None:
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4
        )
        with pytest.raises(ArgumentError, match="node must have a box x1, y1, x2, y2 with x1 < x2 and y1 < y2"):
            effective_bin_locations(detector, torch.rand(3, 64, 64), (box, 1))

    @pytest.mark.parametrize(
        ("node", "message"),
        [
            ((("a", "b", "c", "d"), 1), "node must have a box x1, y1, x2, y2"),
            (((1, 1, 9, 9), 1.5), r"node must have an integer output in \[0, 4\), got 1.5"),
            (((1, 1, 9, 9), "a"), r"node must have an integer output in \[0, 4\), got 'a'"),
            (((1, 1, 9, 9), 4), r"node must have an integer output in \[0, 4\), got 4"),
            (lambda model, images: [1.0], "node must have a response .* got list"),
            (lambda model, images: images.sum(), r"node must have a response \[N, any\] .* got \(\), torch.float32"),
        ],
    )
    def test_regions_and_functions(self, node: Any, message: str) -> None:
        detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_fpn(
            weights=None, weights_backbone=None, num_classes=4
        )
        with pytest.raises(ArgumentError, match=message):
            effective_receptive_field(detector, torch.rand(3, 64, 64), node)

    def test_models_and_values(self) -> None:
        network, image, node = nn.Conv2d(1, 1, 3), torch.rand(1, 9, 9), ("", 1, 1)
        for view in VIEWS:
            with pytest.raises(ArgumentError, match=r"model must be a torch\.nn\.Module, got function"):
                view(lambda x: x, image, node)
            with pytest.raises(ArgumentError, match="image must be finite, got 1 values that are not"):
                view(network, torch.cat([image.flatten()[1:], torch.tensor([math.nan])]).view(1, 9, 9), node)
        for none in (None, 3, "image"):
            with pytest.raises(ArgumentError, match="images must be an image or a sequence of images, got"):
                offset_statistics(network, none)  # type: ignore[arg-type]

    def test_scripted_modules(self) -> None:
        model = torch.jit.script(nn.Sequential(nn.Conv2d(1, 1, 3)))
        with pytest.raises(ArgumentError, match="model must not hold scripted modules"):
            sampling_locations(model, torch.rand(1, 9, 9), ("0", 1, 1))

    def test_no_room_for_the_kernel_is_the_error_of_the_convolution(self) -> None:
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            sampling_locations(nn.Conv2d(1, 1, 12), torch.rand(1, 9, 9), ("", 1, 1))

    def test_numbers(self) -> None:
        network, image = nn.Conv2d(1, 1, 3), torch.rand(1, 9, 9)
        for view in (sampling_locations, effective_sampling_locations):
            for value in (0, 1.5, "a"):
                for name in ("depth", "max_points"):
                    with pytest.raises(ArgumentError, match=f"{name} must be an integer of at least 1, got {value!r}"):
                        view(network, image, ("", 1, 1), **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="there is none before it"):
            sampling_locations(nn.Conv2d(1, 1, 1), image, ("", 1, 1))
        with pytest.raises(ArgumentError, match="images must hold at least one image"):
            offset_statistics(network, [])


@pytest.mark.parametrize("module", ["locations", "nodes", "plots", "saliency", "statistics"])
def test_docstring_examples(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"dcnops.adapters.torch.support.{module}"))
    assert result.attempted > 0 and result.failed == 0
