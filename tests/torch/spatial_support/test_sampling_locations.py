"""The tree of sampling points, compared with an enumeration, and in networks with known points."""

from __future__ import annotations

import copy
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcnops import ArgumentError
from dcnops.adapters.torch import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from dcnops.adapters.torch.spatial_support import OffsetObserver, effective_sampling_locations, sampling_locations
from tests.torch.spatial_support.networks import (
    VIEWS,
    Function,
    Network,
    Points,
    as_dict,
    assert_same,
    randomise_branches,
)


class Enumeration:
    """Every path through deformable layers, one after the other, in plain Python.

    `below` has the numbers of the layers that feed each layer, and the node, which has the number after the last layer.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[Any], image: Tensor, below: Mapping[int, list[int]]
    ) -> None:
        self.layers, self.below = layers, below
        self.branches: dict[int, Tensor] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

        for number, layer in enumerate(layers):

            def record(module: nn.Module, args: Any, result: Tensor, number: int = number) -> None:
                self.branches[number], self.sizes[number] = result[0], tuple(args[0].shape[2:])

            layer.conv_offset.register_forward_hook(record)
        with torch.no_grad():
            network(image)

    def taps(self, number: int, y: int, x: int) -> Iterator[tuple[float, float, float]]:
        """Yield the position and mask of each sample of a pixel of a layer's result."""
        layer, values = self.layers[number], self.branches[number][:, y, x].tolist()
        modulated = isinstance(layer, ModulatedDeformConv2dPack)
        count = len(values) // (3 if modulated else 2)
        rows, columns = map(range, layer.kernel_size)
        for k, (_, i, j) in enumerate(itertools.product(range(layer.deform_groups), rows, columns)):
            py = y * layer.stride[0] - layer.padding[0] + i * layer.dilation[0] + values[2 * k]
            px = x * layer.stride[1] - layer.padding[1] + j * layer.dilation[1] + values[2 * k + 1]
            yield py, px, layer.mask_scale / (1 + math.exp(-values[2 * count + k])) if modulated else 1.0

    def paths(self, y: int, x: int, depth: int) -> dict[int, Points]:
        """Return the points at the far ends of all paths of `depth` layers from the node, by number of the layer."""
        found: dict[int, Points] = defaultdict(lambda: defaultdict(float))

        def follow(above: int, y: int, x: int, strength: float, left: int) -> None:
            for number in self.below[above]:
                height, width = self.sizes[number]
                for py, px, mask in self.taps(number, y, x):
                    if left == 1 or not self.below[number]:
                        found[number][(py, px)] += strength * mask
                        continue
                    for r, s in itertools.product(
                        (math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)
                    ):
                        weight = (1 - abs(py - r)) * (1 - abs(px - s))
                        if 0 <= r < height and 0 <= s < width and weight > 0:
                            follow(number, r, s, strength * mask * weight, left - 1)

        follow(len(self.layers), y, x, 1.0, depth)
        return found


@st.composite
def stacks(draw: st.DrawFn, depth: int) -> tuple[nn.Sequential, Tensor, int, int]:
    """Draw a stack of deformable layers of all kinds, an image and a pixel of the last map."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    layers: list[nn.Module] = []
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
        scale = {"mask_scale": draw(st.sampled_from([1, 2]))} if kind is ModulatedDeformConv2dPack else {}
        layers.append(kind(2, 2, **numbers, **scale))
    network = nn.Sequential(*layers).double()
    randomise_branches(network, draw(st.sampled_from([0.3, 1.5])))
    image = torch.randn(1, 2, 14, 15, dtype=torch.float64)
    height, width = network(image).shape[2:]
    return network, image, draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))


class Branched(nn.Module):
    """Layers of 1x3 that take sums of earlier results; -1 stands for the image."""

    def __init__(self, sources: Sequence[set[int]]) -> None:
        super().__init__()
        self.sources = sources
        self.layers = nn.ModuleList(ModulatedDeformConv2dPack(2, 2, (1, 3), padding=(0, 1)) for _ in sources[1:])
        self.end = nn.Identity()

    def forward(self, image: Tensor) -> Tensor:
        results = {-1: image}
        for number, layer in enumerate(self.layers):
            results[number] = layer(sum(results[source] for source in self.sources[number]))
        return self.end(sum(results[source] for source in self.sources[-1]))


class TestSamplingLocations:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(2, 3).flatmap(stacks))
    def test_equals_the_enumeration_of_a_stack(self, drawn: tuple[nn.Sequential, Tensor, int, int]) -> None:
        network, image, y, x = drawn
        depth = len(network)
        below = {number: [number - 1] if number else [] for number in range(depth + 1)}
        expected = Enumeration(network, list(network), image, below).paths(y, x, depth)[0]
        points = sampling_locations(network, image, (f"{depth - 1}", y, x), depth=depth)
        assert_same(as_dict(points), expected)
        assert points.strength.sum() == pytest.approx(sum(expected.values()))

    @settings(max_examples=25, deadline=None)
    @given(st.data())
    def test_equals_the_enumeration_of_branches_and_shortcuts(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(2, 4))
        sources = [
            data.draw(st.sets(st.integers(-1, number - 1), min_size=1), label=f"sources of {number}")
            for number in range(count + 1)
        ]
        if sources[-1] == {-1}:
            sources[-1] = {0}
        depth = data.draw(st.integers(1, 4))
        torch.manual_seed(data.draw(st.integers(0, 2**31)))
        network = randomise_branches(Branched(sources)).double()
        image = torch.rand(1, 2, 8, 8, dtype=torch.float64)

        def longest(above: int, below: int) -> int:
            """Return the length of the longest path in layers; 0 if there is none."""
            further = [length for source in sources[above] if source >= 0 and (length := longest(source, below))]
            return max(further) + 1 if further else int(below in sources[above])

        below = {above: [b for b in range(above) if longest(above, b) == 1] for above in range(count + 1)}
        expected = Enumeration(network, list(network.layers), image, below).paths(3, 4, depth)
        points = sampling_locations(network, image, ("end", 3, 4), depth=depth)
        assert set(points.layers) == {f"layers.{number}" for number in expected}
        for index, name in enumerate(points.layers):
            chosen = points.layer == index
            found = points._replace(positions=points.positions[chosen], strength=points.strength[chosen])
            assert_same(as_dict(found), expected[int(name.removeprefix("layers."))])

    def test_parallel_branches_belong_to_the_stack(self) -> None:
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

    def test_coarser_maps_count_if_there_is_no_other_path(self) -> None:
        convolutions = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)]
        network = nn.Sequential(
            convolutions[0], nn.MaxPool2d(4), *convolutions[1:3], nn.Upsample(scale_factor=4), convolutions[3]
        )
        for depth, far in ((1, "5"), (2, "3"), (3, "2"), (4, "0")):
            assert sampling_locations(network, torch.rand(1, 64, 64), ("5", 32, 32), depth=depth).layers == [far]

    def test_a_layer_that_is_called_twice_counts_once(self) -> None:
        layer, image = nn.Conv2d(1, 2, 3, padding=1), torch.rand(1, 9, 9)
        network = Network(lambda net, x: net.end(net.layer(x) + net.layer(2 * x)), layer=layer, end=nn.Identity())
        points = sampling_locations(network, image, ("end", 4, 4))
        assert points.layers == ["layer"] and points.strength.tolist() == [2.0] * 9
        points = effective_sampling_locations(network, image, ("end", 4, 4))
        assert points.layers == ["layer"] and len(points.positions) == 18

    def test_layers_must_run_on_one_image(self) -> None:
        network = nn.Sequential(Function("", lambda x: torch.cat([x, 2 * x])), nn.Conv2d(1, 2, 3))
        network.append(Function("", lambda x: x[:1] + x[1:]))
        for view in (sampling_locations, effective_sampling_locations):
            with pytest.raises(ArgumentError, match="model must run '1' on one image at a time, it ran on 2"):
                view(network, torch.rand(1, 9, 9), ("2", 4, 4))

    def test_integer_positions_stay_integer_on_odd_scales(self) -> None:
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
        paths = nn.functional.conv1d(torch.tensor([[[1, 1.75, 0.25]]]), torch.ones(1, 1, 3), padding=2)[0, 0].tolist()
        assert as_dict(points) == {(3.0 + i, 3.0 + j): paths[i] * paths[j] for i in range(5) for j in range(5)}

    @pytest.mark.parametrize("depth", [1, 2, 3])
    def test_regular_convolutions_sample_a_grid(self, depth: int) -> None:
        network = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(4)))
        points = as_dict(sampling_locations(network, torch.rand(2, 20, 21), ("3", 9, 11), depth=depth))
        paths = torch.ones(1)
        for _ in range(depth):
            paths = torch.conv1d(nn.functional.pad(paths, (2, 2))[None, None], torch.ones(1, 1, 3))[0, 0]
        around = range(-depth, depth + 1)
        assert points == {
            (9.0 + i, 11.0 + j): float(paths[i + depth] * paths[j + depth]) for i in around for j in around
        }

    def test_strides_and_dilations(self) -> None:
        network = nn.Sequential(
            nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.ReLU(inplace=True), nn.Conv2d(2, 2, (3, 1), dilation=2)
        )
        points = sampling_locations(network, torch.rand(1, 30, 30), ("2", 3, 4))
        rows = [2 * (3 + 2 * i) + k for i in range(3) for k in (-1, 0, 1)]
        assert as_dict(points) == {(float(row), 8.0 + k): 1.0 for row in rows for k in (-1, 0, 1)}

    def test_offset_branches_are_not_in_the_stack(self) -> None:
        """Not even those that are written as usual with torchvision."""

        def layer() -> nn.Module:
            offsets, conv = nn.Conv2d(2, 18, 3, padding=1), torchvision.ops.DeformConv2d(2, 2, 3, padding=1)
            return Network(lambda net, x: net.conv(x, net.offsets(x)), offsets=offsets, conv=conv)

        network = nn.Sequential(layer(), layer())
        points = sampling_locations(network, torch.rand(2, 12, 12), ("1", 4, 4), depth=9)
        assert points.layers == ["0.conv"]
        effective = effective_sampling_locations(network, torch.rand(2, 12, 12), ("1", 4, 4), depth=None)
        assert effective.layers == ["1.conv", "0.conv"]

    def test_layers_of_torchvision(self) -> None:
        torch.manual_seed(0)
        image, offset = torch.rand(2, 12, 13), 2 * torch.randn(1, 36, 12, 13)
        mask = torch.rand(1, 18, 12, 13)

        theirs, ours = (
            Network(lambda net, x: net.layer(x, offset, mask), layer=kind(2, 4, 3, padding=1))
            for kind in (torchvision.ops.DeformConv2d, DeformConv2d)
        )
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
        for names in ([], "1", 1):
            with pytest.raises(ArgumentError, match="layers must be a sequence of names among"):
                effective_sampling_locations(network, image, node, layers=names)

    def test_max_points_keeps_the_strongest(self) -> None:
        network = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(2)))
        points = sampling_locations(network, torch.rand(1, 12, 12), ("1", 6, 6), max_points=5)
        assert points.strength.tolist() == [9, 6, 6, 6, 6]
        assert points.positions[0].tolist() == [6, 6]

    @pytest.mark.slow
    def test_compiled_models_and_parts_run_as_python(self) -> None:
        compiled = []

        def backend(graph: Any, inputs: Any) -> Any:
            compiled.append(graph)
            return graph.forward

        layer = nn.Conv2d(2, 2, 3, padding=1)
        inside = torch.compile(lambda x: layer(x).relu(), backend=backend, fullgraph=True)
        network = nn.Sequential(DeformConv2dPack(1, 2, 3), Function("", inside), nn.Conv2d(2, 2, 3))
        image, plain = torch.rand(1, 12, 12), copy.deepcopy(network[0])
        uncompiled = nn.Sequential(plain, layer, nn.ReLU(), network[2])
        expected = as_dict(sampling_locations(uncompiled, image, ("3", 3, 3)))
        network[0].compile(backend=backend, fullgraph=True)
        whole = torch.compile(network, backend=backend, fullgraph=True)
        for model, name in ((network, "2"), (whole, "_orig_mod.2")):
            for view in VIEWS:
                view(model, image, (name, 3, 3))
            assert as_dict(sampling_locations(model, image, (name, 3, 3))) == expected
            with OffsetObserver(model) as observer:
                model(image[None])
            assert len(next(iter(observer.statistics().values())).offsets) == 900
            assert not compiled
        assert torch.equal(network[0](image[None]), plain(image[None])) and compiled

    def test_one_stage_detectors_run_the_backbone_only(self) -> None:
        detector = torchvision.models.detection.retinanet_resnet50_fpn(weights=None, weights_backbone=None)
        points = sampling_locations(detector, torch.rand(3, 64, 64), ("backbone.fpn.layer_blocks.0", 4, 4), depth=1)
        assert points.positions.mean(0).tolist() == [32, 32]

    def test_points_that_are_not_finite_are_left_out(self) -> None:
        layer = DeformConv2dPack(1, 1, 3, padding=1)
        layer.conv_offset.bias.data[:3] = torch.tensor([math.nan, 0, math.inf])
        assert len(sampling_locations(layer, torch.rand(1, 9, 9), ("", 4, 4)).positions) == 7

    def test_a_feature_pyramid_is_followed_down_the_backbone(self) -> None:
        body = torchvision.models.resnet18(weights=None)
        backbone = torchvision.models.detection.backbone_utils._resnet_fpn_extractor(body, 5)
        calls = sampling_locations(backbone, torch.rand(3, 64, 64), ("fpn.layer_blocks.1", 3, 3), depth=3)
        assert calls.layers == ["body.layer2.1.conv1"]  # below layer2.1.conv2 and the pyramid's own layer
        assert calls.positions.mean(0).tolist() == pytest.approx([24, 24])
