"""The tree of sampling points against enumeration, and in networks with known answers."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision
from dcnops.adapters.torch import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2dPack,
)
from dcnops.adapters.torch.spatial_support import (
    OffsetObserver,
    effective_sampling_locations,
    sampling_locations,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcnops import ArgumentError
from tests.torch.spatial_support.networks import VIEWS, Function, Points, as_dict, assert_same, wake


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

    def test_coarser_maps_belong_to_the_way_if_there_is_no_other(self) -> None:
        convolutions = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)]
        network = nn.Sequential(
            convolutions[0], nn.MaxPool2d(4), *convolutions[1:3], nn.Upsample(scale_factor=4), convolutions[3]
        )
        for depth, far in ((1, "5"), (2, "3"), (3, "2"), (4, "0")):
            assert sampling_locations(network, torch.rand(1, 64, 64), ("5", 32, 32), depth=depth).layers == [far]

    def test_a_layer_that_is_called_twice_is_one(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.end = nn.Conv2d(1, 2, 3, padding=1), nn.Identity()

            def forward(self, x: Tensor) -> Tensor:
                return self.end(self.layer(x) + self.layer(2 * x))

        points = sampling_locations(Twice(), torch.rand(1, 9, 9), ("end", 4, 4))
        assert points.layers == ["layer"] and points.strength.tolist() == [2.0] * 9
        points = effective_sampling_locations(Twice(), torch.rand(1, 9, 9), ("end", 4, 4))
        assert points.layers == ["layer"] and len(points.positions) == 18

    def test_layers_run_on_one_image(self) -> None:
        network = nn.Sequential(Function("", lambda x: torch.cat([x, 2 * x])), nn.Conv2d(1, 2, 3))
        network.append(Function("", lambda x: x[:1] + x[1:]))
        for view in (sampling_locations, effective_sampling_locations):
            with pytest.raises(ArgumentError, match="model must run '1' on one image at a time, it ran on 2"):
                view(network, torch.rand(1, 9, 9), ("2", 4, 4))

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
        assert len(sampling_locations(network, image, node, layers=(name for name in "21")).positions) == 25
        for none in ([], "1", 1):
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

    def test_whatever_is_compiled_runs_as_it_was_written(self) -> None:
        compiled = []

        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        class Inside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Conv2d(2, 2, 3, padding=1)
                self.function = torch.compile(lambda x: self.layer(x).relu(), backend=backend, fullgraph=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.function(x)

        network = nn.Sequential(DeformConv2dPack(1, 2, 3), Inside(), nn.Conv2d(2, 2, 3))
        image, plain = torch.rand(1, 12, 12), copy.deepcopy(network[0])
        network[0].compile(backend=backend, fullgraph=True)
        whole = torch.compile(network, backend=backend, fullgraph=True)
        for model, name in ((network, "2"), (whole, "_orig_mod.2")):
            for view in VIEWS:
                view(model, image, (name, 3, 3))
            with OffsetObserver(model) as observer:
                model(image[None])
            assert len(next(iter(observer.statistics().values())).offsets) == 900
            assert not compiled
        assert torch.equal(network[0](image[None]), plain(image[None])) and compiled

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
