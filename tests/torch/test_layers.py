"""Layers: initial output, branches, gradients, state dicts, memory formats, tracing, errors."""

from __future__ import annotations

import copy
import doctest
import functools
import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import conv2d
from torchvision.models.feature_extraction import create_feature_extractor

from dcnops import ArgumentError, DcnError, DtypeError, ShapeError
from dcnops.adapters.torch import (
    DeformConv2d,
    DeformConv2dPack,
    DeformRoIPool,
    DeformRoIPoolPack,
    ModulatedDeformConv2dPack,
    ModulatedDeformRoIPoolPack,
    MultiScaleDeformRoIPool,
    dcn_v2,
    deform_conv2d,
    deform_roi_pool,
    functional,
    mmcv_ops,
    zero_layers,
)

ROIS = torch.tensor([[0, 1.5, 2.0, 9.0, 7.5], [1, 0.0, 0.0, 12.0, 10.0], [0, -3.0, 4.0, 5.0, 30.0]])
GEOMETRIES = {
    "plain": {"kernel_size": 3, "padding": 1},
    "unequal axes": {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2, "bias": False},
    "one tap": {"kernel_size": 1, "stride": 2},
}


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 4, 9, 8)))


def excite(module: nn.Module, size: float = 0.3) -> nn.Module:
    """Randomise all parameters so that branches affect the output."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-size, size)
    return module


def layers() -> dict[str, tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """Create one layer of each kind with randomised parameters, and arguments for it."""
    offset, mask = image(2, 18, 9, 8), torch.rand(2, 9, 9, 8)
    features = {"0": image(2, 4, 32, 32), "1": image(2, 4, 16, 16)}
    boxes = [torch.tensor([[0.0, 0, 40, 30]]), torch.tensor([[10.0, 0, 250, 240], [3, 3, 50, 60]])]
    pyramid = (features, boxes, [(256, 256), (256, 200)])
    modules = {
        "DeformConv2d": (DeformConv2d(4, 6, 3, padding=1), (image(), offset, mask)),
        "DeformConv2dPack": (DeformConv2dPack(4, 6, 3, padding=1, deform_groups=2), (image(),)),
        "ModulatedDeformConv2dPack": (ModulatedDeformConv2dPack(4, 6, 3, padding=1, mask_scale=2.0), (image(),)),
        "DeformRoIPool": (DeformRoIPool(3), (image(2, 4, 10, 12), ROIS, image(3, 2, 3, 3), image(3, 3, 3))),
        "DeformRoIPoolPack": (DeformRoIPoolPack(3, 4), (image(2, 4, 10, 12), ROIS)),
        "ModulatedDeformRoIPoolPack": (ModulatedDeformRoIPoolPack(3, 4, 16), (image(2, 4, 10, 12), ROIS)),
        "shared pyramid": (MultiScaleDeformRoIPool(["0", "1"], ModulatedDeformRoIPoolPack(3, 4, 16)), pyramid),
        "separate pyramid": (MultiScaleDeformRoIPool(["0", "1"], DeformRoIPoolPack(3, 4), False), pyramid),
    }
    return {name: (excite(module), call) for name, (module, call) in modules.items()}


LAYERS = tuple(layers())

# Output before training


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@pytest.mark.parametrize("deform_groups", [1, 2])
def test_convolutions_start_as_plain_convolutions(geometry: dict, deform_groups: int):
    x = image()

    def plain(layer):
        return conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)

    layer = DeformConv2dPack(4, 6, deform_groups=deform_groups, **geometry)
    torch.testing.assert_close(layer(x), plain(layer))
    layer = ModulatedDeformConv2dPack(4, 6, deform_groups=deform_groups, mask_scale=2.0, **geometry)
    torch.testing.assert_close(layer(x), plain(layer))
    layer = ModulatedDeformConv2dPack(4, 6, deform_groups=deform_groups, **geometry)
    bias = 0 if layer.bias is None else layer.bias[:, None, None]
    torch.testing.assert_close(layer(x) - bias, (plain(layer) - bias) / 2)


@pytest.mark.parametrize("output_size", [3, (2, 4)])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_pooling_starts_as_roi_align(output_size, sampling_ratio: int):
    x, options = image(2, 4, 10, 12), {"spatial_scale": 0.5, "sampling_ratio": sampling_ratio}
    expected = torchvision.ops.roi_align(x, ROIS, output_size, **options, aligned=True)
    torch.testing.assert_close(DeformRoIPool(output_size, **options)(x, ROIS), expected)
    torch.testing.assert_close(DeformRoIPoolPack(output_size, 4, **options)(x, ROIS), expected)
    torch.testing.assert_close(DeformRoIPoolPack(output_size, 4, 8, num_fcs=2, **options)(x, ROIS), expected)
    torch.testing.assert_close(ModulatedDeformRoIPoolPack(output_size, 4, 8, **options)(x, ROIS), expected / 2)
    scaled = ModulatedDeformRoIPoolPack(output_size, 4, 8, **options, mask_scale=2.0)
    torch.testing.assert_close(scaled(x, ROIS), expected)


def test_branches_have_the_size_of_the_paper():
    pool = DeformRoIPoolPack(7, 256)
    assert sum(parameter.numel() for parameter in pool.parameters()) == 12544 * 98 + 98
    pool = ModulatedDeformRoIPoolPack(7, 256)
    hidden, last = (12544 + 1) * 1024 + (1024 + 1) * 1024, (1024 + 1) * 147
    assert sum(parameter.numel() for parameter in pool.parameters()) == hidden + last
    first = pool.offset_fc[0]
    assert abs(first.weight.std().item() - 0.01) < 1e-4 and not first.bias.any()
    assert not pool.offset_fc[-1].weight.any() and not pool.offset_fc[-1].bias.any()


# Output after training


@pytest.mark.parametrize("deform_groups", [1, 2])
def test_branch_predicts_offsets_then_mask_logits(deform_groups: int):
    x = image()
    numbers = {"stride": 2, "padding": 2, "dilation": 2}
    layer = excite(ModulatedDeformConv2dPack(4, 6, 3, **numbers, deform_groups=deform_groups, mask_scale=1.5))
    branch = conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, **numbers)
    points = 9 * deform_groups
    expected = deform_conv2d(
        x, branch[:, : 2 * points], layer.weight, layer.bias, **numbers, mask=1.5 * branch[:, 2 * points :].sigmoid()
    )
    torch.testing.assert_close(layer(x), expected)
    layer = excite(DeformConv2dPack(4, 6, 3, **numbers, deform_groups=deform_groups))
    branch = conv2d(x, layer.conv_offset.weight, layer.conv_offset.bias, **numbers)
    torch.testing.assert_close(layer(x), deform_conv2d(x, branch, layer.weight, layer.bias, **numbers))


def test_bias_of_a_branch_moves_the_samples():
    x = image(1, 1, 8, 8)
    layer = DeformConv2dPack(1, 1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.conv_offset.bias.copy_(torch.tensor([1.0, 2.0]))  # dy, dx
    torch.testing.assert_close(layer(x)[:, :, :7, :6], x[:, :, 1:, 2:])

    pool = DeformRoIPoolPack(1, 1, sampling_ratio=1, gamma=0.5)
    with torch.no_grad():
        pool.offset_fc[-1].bias.copy_(torch.tensor([2.0, 1.0]))  # dx, dy in halves of a 2 x 2 region
    pooled = pool(x, torch.tensor([[0, 1.0, 1.0, 3.0, 3.0]]))
    moved = torchvision.ops.roi_align(x, [torch.tensor([[3.0, 2.0, 5.0, 4.0]])], 1, sampling_ratio=1, aligned=True)
    torch.testing.assert_close(pooled, moved)


def test_modulated_roi_pooling_splits_its_branch():
    x = image(2, 4, 10, 12)
    pool = excite(ModulatedDeformRoIPoolPack((2, 3), 4, 8, gamma=0.7, mask_scale=1.5))
    values = pool.offset_fc(DeformRoIPool((2, 3))(x, ROIS).flatten(1))
    offset, mask = values[:, :12].reshape(3, 2, 2, 3), 1.5 * values[:, 12:].sigmoid().reshape(3, 2, 3)
    torch.testing.assert_close(pool(x, ROIS), deform_roi_pool(x, ROIS, offset, mask, output_size=(2, 3), gamma=0.7))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_reach_the_input_and_every_parameter(name: str):
    module, call = layers()[name]
    leaves = list(call[0].values()) if isinstance(call[0], dict) else [call[0]]
    for leaf in leaves:
        leaf.requires_grad_()
    (module(*call) ** 2).sum().backward()
    for parameter in [*leaves, *module.parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()


def test_branches_learn_from_zero():
    """The first step changes only the last layer of a branch. After it, the other layers have a gradient too."""
    for module, call in (
        (DeformConv2dPack(4, 6, 3, padding=1), (image(),)),
        (ModulatedDeformConv2dPack(4, 6, 3, padding=1), (image(),)),
        (DeformRoIPoolPack(3, 4), (image(2, 4, 10, 12), ROIS)),
        (ModulatedDeformRoIPoolPack(3, 4, 8), (image(2, 4, 10, 12), ROIS)),
    ):
        optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            (module(*call) ** 2).sum().backward()
            optimiser.step()
        for name, parameter in module.named_parameters():
            assert parameter.grad.any(), name


# torchvision.ops.DeformConv2d


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_layer_is_interchangeable_with_that_of_torchvision(geometry: dict):
    theirs, ours = torchvision.ops.DeformConv2d(4, 6, **geometry), DeformConv2d(4, 6, **geometry)
    x = image()
    size = conv2d(x, ours.weight, None, ours.stride, ours.padding, ours.dilation, ours.groups).shape[2:]
    taps = ours.kernel_size[0] * ours.kernel_size[1]
    offset, mask = image(2, 2 * taps, *size), torch.rand(2, taps, *size)
    for source, target in ((theirs, ours), (ours, theirs)):
        excite(source)
        target.load_state_dict(source.state_dict())
        torch.testing.assert_close(target(x, offset, mask), source(x, offset, mask))
        torch.testing.assert_close(target(x, offset), source(x, offset))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_initial_weights_equal_those_of_torch():
    torch.manual_seed(7)
    plain = nn.Conv2d(4, 6, 3, groups=2)
    for kind in (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack):
        torch.manual_seed(7)
        layer = kind(4, 6, 3, groups=2)
        torch.testing.assert_close(layer.weight, plain.weight)
        torch.testing.assert_close(layer.bias, plain.bias)


# Copies, compilation, dtypes and memory formats


@pytest.mark.parametrize("name", LAYERS)
def test_copies_compute_the_same(name: str):
    module, call = layers()[name]
    expected = module(*call)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    fresh = excite(copy.deepcopy(module), 0.1)
    fresh.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), torch.load(buffer, weights_only=False), fresh, copy.deepcopy(module).eval()):
        assert torch.equal(twin(*call), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS[:-2])  # pyramids select boxes by value, which fullgraph does not allow
def test_compiled_layers(name: str):
    module, call = layers()[name]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*call), module(*call))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_other_dtypes(name: str, dtype: torch.dtype):
    def cast(value, dtype: torch.dtype):
        if isinstance(value, dict):
            return {key: tensor.to(dtype) for key, tensor in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    module, call = layers()[name]
    # Start from numbers that both dtypes represent exactly, so that only rounding inside the layer differs.
    narrow = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
    module = module.to(narrow).to(torch.float32)
    call = tuple(cast(cast(value, narrow), torch.float32) for value in call)
    expected = module(*call)
    output = module.to(dtype)(*(cast(value, dtype) for value in call))
    assert output.dtype == dtype
    tolerance = {torch.float64: 1e-5, torch.float16: 2e-2, torch.bfloat16: 2e-1}[dtype]
    torch.testing.assert_close(output.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_memory_formats(name: str):
    def views(value: torch.Tensor) -> list[torch.Tensor]:
        if value.ndim != 4:
            return [value] * 3
        wide = torch.stack([value, torch.full_like(value, torch.nan)], dim=-1).flatten(3)[..., ::2]
        return [value.contiguous(memory_format=torch.channels_last), wide, value.transpose(2, 3).contiguous().mT]

    module, call = layers()[name]
    x = call[0]
    expected = module(*call)
    if isinstance(x, dict):
        variants = [dict(zip(x, items)) for items in zip(*(views(value) for value in x.values()))]
        rest = [call[1:]] * 3
    else:
        variants = views(x)
        rest = list(zip(*(views(value) for value in call[1:]))) or [()] * 3
    for variant, others in zip(variants, rest):
        torch.testing.assert_close(module(variant, *others), expected)
    if not isinstance(x, dict):
        grads = []
        for variant in (x, *variants):
            leaf = variant.detach().requires_grad_()
            grads.append(torch.autograd.grad((module(leaf, *call[1:]) ** 2).sum(), leaf)[0])
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


def test_channels_last_modules():
    for name in ("DeformConv2dPack", "ModulatedDeformConv2dPack"):
        module, (x,) = layers()[name]
        expected = module(x)
        converted = module.to(memory_format=torch.channels_last)
        torch.testing.assert_close(converted(x.contiguous(memory_format=torch.channels_last)), expected)


def network_with_branches() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(4, 4, 1),
        DeformConv2dPack(4, 4, 3),
        ModulatedDeformConv2dPack(4, 4, 3),
        mmcv_ops.DeformConv2dPack(4, 4, 3),
        mmcv_ops.ModulatedDeformConv2dPack(4, 4, 3),
        dcn_v2.DCN(4, 4, 3, 1, 1),
        DeformRoIPoolPack(3, 4),
        ModulatedDeformRoIPoolPack(3, 4, 8),
        mmcv_ops.ModulatedDeformRoIPoolPack(3, 4, 8),
        dcn_v2.DCNPooling(1.0, 3, 4, no_trans=False, deform_fc_dim=8),
    )


def assert_branches_are_zero(network: nn.Sequential) -> None:
    branches = [branch for branch in network.modules() if isinstance(branch, zero_layers.ZeroLayer)]
    assert len(branches) == 10
    assert not any(parameter.any() for branch in branches for parameter in branch.parameters())


def initialise_by_type(layer: nn.Module) -> None:
    if isinstance(layer, (nn.Conv2d, nn.Linear, DeformConv2d)):
        nn.init.kaiming_normal_(layer.weight)


def initialise_by_name(layer: nn.Module) -> None:
    if "Conv" in type(layer).__name__ or "Linear" in type(layer).__name__:
        nn.init.normal_(layer.weight, 0, 0.02)


def initialise_by_base(layer: nn.Module) -> None:
    """Do what the initialisers of mmengine do."""
    if {"Conv2d", "Linear"} & {kind.__name__ for kind in (type(layer), *type(layer).__bases__)}:
        nn.init.kaiming_normal_(layer.weight)


@pytest.mark.parametrize("initialise", [initialise_by_type, initialise_by_name, initialise_by_base])
def test_initialisers_of_networks_leave_branches_at_zero(initialise):
    network = network_with_branches()
    before = network[0].weight.clone()
    network.apply(initialise)
    assert not torch.equal(network[0].weight, before)
    assert_branches_are_zero(network)


def test_networks_of_fake_tensors_can_be_initialised():
    with FakeTensorMode():
        network = network_with_branches()
        network.apply(initialise_by_type)
        assert network[0](torch.empty(1, network[0].in_channels, 9, 9)).shape[1] == network[0].out_channels


def test_resetting_a_layer_resets_its_branch():
    for layer in network_with_branches():
        if hasattr(layer, "reset_parameters"):
            excite(layer)
            before = layer.weight.clone()
            layer.reset_parameters()
            assert not torch.equal(layer.weight, before)
            assert not any(p.any() for m in layer.children() for p in m.parameters())


@pytest.mark.parametrize("reset", [False, True])
def test_branches_that_leave_the_meta_device_are_zero(reset: bool):
    """Frameworks call to_empty, some of them then reset_parameters of every module."""
    with torch.device("meta"):
        network = network_with_branches()
    # Memory that holds numbers, as an allocator may return it.
    network._apply(lambda tensor: torch.full_like(tensor, 7, device="cpu"))
    if reset:
        for module in network.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert all(layer.weight.unique().numel() > 1 for layer in (network[2], network[7].offset_fc[0]))
    assert_branches_are_zero(network)


def test_parameters_are_created_as_those_of_torch():
    for kind, *arguments in (
        (DeformConv2d, 4, 6, 3),
        (ModulatedDeformConv2dPack, 4, 6, 3),
        (ModulatedDeformRoIPoolPack, 3, 4),
    ):
        layer = kind(*arguments, device="meta", dtype=torch.float64)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_skip_init_keeps_the_branch_zero():
    """Memory without an initial value is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        conv = nn.utils.skip_init(ModulatedDeformConv2dPack, 4, 6, 3)
        pool = nn.utils.skip_init(ModulatedDeformRoIPoolPack, 3, 4, 8)
    finally:
        torch.use_deterministic_algorithms(False)
    assert conv.weight.isnan().all() and not conv.conv_offset.weight.any() and not conv.conv_offset.bias.any()
    assert pool.offset_fc[0].weight.isnan().all() and not pool.offset_fc[-1].weight.any()


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel_size", [3, (5, 1), (2, 4)])
def test_padding_by_name(padding: str, kernel_size: Any):
    """Even kernels are padded more at the bottom and on the right, which layers cannot do."""
    x = image(2, 4, 9, 12)
    plain = nn.Conv2d(4, 6, kernel_size, padding=padding, dilation=1 if kernel_size == 3 else (1, 3))
    expected = plain(x)
    offset = x.new_zeros(2, 2 * plain.weight[0, 0].numel(), *expected.shape[2:])
    arguments = {"padding": padding, "dilation": plain.dilation}
    torch.testing.assert_close(deform_conv2d(x, offset, plain.weight, plain.bias, **arguments), expected)
    if padding == "same" and kernel_size == (2, 4):
        with pytest.raises(ArgumentError, match=r"padding='same' must pad both sides alike in a layer"):
            DeformConv2dPack(4, 6, kernel_size, **arguments)
        return
    layer = DeformConv2dPack(4, 6, kernel_size, **arguments)
    layer.load_state_dict(plain.state_dict(), strict=False)
    torch.testing.assert_close(layer(x), expected)


def test_padding_by_name_with_a_weight_of_another_rank():
    x = image(2, 4, 9, 12)
    for shape in ((6, 4), (6, 4, 3), (6, 4, 3, 3, 3)):
        with pytest.raises(ShapeError, match="weight must have 4 dimensions"):
            deform_conv2d(x, x.new_zeros(2, 18, 9, 12), x.new_zeros(shape), padding="same")


def test_reprs():
    assert repr(DeformConv2d(4, 6, 3)) == "DeformConv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))"
    text = repr(ModulatedDeformConv2dPack(4, 6, (3, 1), 2, 1, 2, 2, 2, False, mask_scale=2.0))
    assert text.startswith("ModulatedDeformConv2dPack(\n  4, 6, kernel_size=(3, 1), stride=(2, 2), padding=(1, 1), ")
    assert "dilation=(2, 2), groups=2, bias=False, deform_groups=2, mask_scale=2.0\n  (conv_offset): Offset" in text
    text = repr(DeformRoIPoolPack((7, 5), 4, spatial_scale=0.25))
    assert "output_size=(7, 5), spatial_scale=0.25, sampling_ratio=2, gamma=0.1, output_channels=4" in text
    pyramid = MultiScaleDeformRoIPool(["0", "1"], DeformRoIPoolPack(7, 4), share_branch=False)
    assert "featmap_names=['0', '1'], share_branch=False" in repr(pyramid)


@pytest.mark.parametrize("shape", [(0, 4, 9, 8), (33, 4, 3, 3)])
def test_batches(shape: tuple[int, ...]):
    for module in (DeformConv2dPack(4, 6, 3, padding=1), ModulatedDeformConv2dPack(4, 6, 3, padding=1)):
        x = image(*shape)
        output = excite(module)(x)
        assert output.shape == (shape[0], 6, *shape[2:])
        parts = [module(part) for part in x.split(1)]
        torch.testing.assert_close(output, torch.cat([output[:0], *parts]))


def test_no_regions():
    for name in ("DeformRoIPoolPack", "ModulatedDeformRoIPoolPack"):
        module, (x, rois) = layers()[name]
        output = module(x, rois[:0])
        assert output.shape == (0, 4, 3, 3)
        output.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in module.parameters())


# Pyramids


def test_levels_equal_those_of_torchvision():
    names = ["0", "1", "2", "3"]
    features = {name: image(2, 3, 64 >> k, 96 >> k) for k, name in enumerate(names)}
    features["pool"] = image(2, 3, 4, 6)
    corners, sizes = torch.rand(200, 2) * 100, 10 ** (torch.rand(200, 2) * 3)
    exact = torch.tensor([[0.0, 0, 112, 112], [0, 0, 224, 224], [0, 0, 223.9999, 224], [5, 5, 5, 60]])
    boxes = [torch.cat([corners, corners + sizes], 1), exact]
    shapes = [(250, 380), (256, 300)]
    theirs = torchvision.ops.MultiScaleRoIAlign(names, 3, 2)
    ours = MultiScaleDeformRoIPool(names, DeformRoIPool(3))
    # torchvision does not shift by half a pixel. The shift depends on the level, so compare level by level.
    expected = torch.zeros(204, 3, 3, 3)
    theirs(features, boxes, shapes)
    levels = theirs.map_levels(boxes)
    rois = torchvision.ops._utils.convert_boxes_to_roi_format(boxes)
    for k, name in enumerate(names):
        rows = levels == k
        assert rows.any()
        expected[rows] = torchvision.ops.roi_align(features[name], rois[rows], 3, 0.25 / 2**k, 2, aligned=True)
    torch.testing.assert_close(ours(features, boxes, shapes), expected)


@pytest.mark.parametrize("upright", [False, True])
def test_scale_of_a_level_comes_from_the_longer_side(upright: bool):
    """An image of 33 x 300 is padded to 64 x 320: its height would suggest stride 2 instead of 4."""
    features, shape, box = {"0": image(1, 2, 16, 80)}, (33, 300), torch.tensor([[20.0, 8, 60, 30]])
    if upright:
        features, shape, box = {"0": features["0"].mT}, shape[::-1], box[:, [1, 0, 3, 2]]
    expected = torchvision.ops.roi_align(features["0"], [box], 3, 0.25, 2, aligned=True)
    output = MultiScaleDeformRoIPool(["0"], DeformRoIPool(3))(features, [box], [shape])
    torch.testing.assert_close(output, expected)


def test_shared_and_separate_branches():
    shared = MultiScaleDeformRoIPool(["0", "1"], ModulatedDeformRoIPoolPack(3, 4, 16))
    assert all(name.startswith("pools.0.offset_fc.") for name in shared.state_dict())
    separate = MultiScaleDeformRoIPool(["0", "1"], ModulatedDeformRoIPoolPack(3, 4, 16), share_branch=False)
    count = sum(parameter.numel() for parameter in shared.parameters())
    assert sum(parameter.numel() for parameter in separate.parameters()) == 2 * count
    assert shared.output_size == (3, 3)


def test_branches_of_levels_without_boxes_have_a_gradient():
    module, (features, _, shapes) = layers()["separate pyramid"]
    boxes = [torch.tensor([[0.0, 0, 10, 10]]), torch.zeros(0, 4)]
    module(features, boxes, shapes).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module(features, [torch.zeros(0, 4)] * 2, shapes).shape == (0, 4, 3, 3)


def test_boxes_without_a_size():
    pool = MultiScaleDeformRoIPool(["0", "1"], DeformRoIPool(3))
    features = {"0": image(1, 4, 32, 32), "1": image(1, 4, 16, 16)}
    boxes = torch.tensor([[5.0, 5, 1, 9], [5, 5, 5, 5], [torch.nan, 0, 4, 4], [0, 0, 400, 400]])
    output = pool(features, [boxes], [(128, 128)])
    assert output.shape == (4, 4, 3, 3)
    assert output.isnan().flatten(1).all(1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_boxes_of_low_precision(dtype: torch.dtype):
    """Indices of images, areas and scaled coordinates need more precision than 16 bits have."""
    count = 299
    maps = {"0": torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 1, 8, 8)}
    pool = MultiScaleDeformRoIPool(["0"], DeformRoIPool(1))
    boxes = [torch.tensor([[4, 4, 28, 28]], dtype=dtype)] * count
    assert pool(maps, boxes, [(32, 32)] * count).flatten().tolist() == list(range(count))
    names = ["0", "1", "2", "3"]
    features = {name: image(1, 2, 128 >> k, 128 >> k) for k, name in enumerate(names)}
    pool = MultiScaleDeformRoIPool(names, DeformRoIPool(2))
    exact = torch.tensor([[0.0, 0, 300, 300], [0, 0, 400, 400]])  # areas overflow float16
    assert torch.equal(pool(features, [exact.to(dtype)], [(512, 512)]), pool(features, [exact], [(512, 512)]))


def test_pyramid_pooling_in_a_detector_of_torchvision():
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64, rpn_post_nms_top_n_test=20
    )
    model.roi_heads.box_roi_pool = MultiScaleDeformRoIPool(["0", "1", "2", "3"], DeformRoIPoolPack(7, 256))
    found = model.eval()([torch.rand(3, 64, 64)])
    assert set(found[0]) == {"boxes", "labels", "scores"}


# Errors

conv, pyramid = functools.partial(DeformConv2d, kernel_size=3), MultiScaleDeformRoIPool


@pytest.mark.parametrize(
    "constructor, message",
    [
        (lambda: DeformConv2d(4, 6, 0), "kernel_size must be an integer from 1"),
        (lambda: conv(4, 6, stride=0), "stride must be an integer from 1"),
        (lambda: conv(4, 6, padding=-1), "padding must be an integer from 0"),
        (lambda: conv(4, 6, padding="full"), "padding must be numbers of pixels, 'same' or 'valid', got 'full'"),
        (lambda: conv(4, 6, padding="same", stride=2), r"stride must be 1 with padding='same', got \(2, 2\)"),
        (lambda: conv(4, 6, dilation=(1, 2, 3)), "dilation must be an integer from 1"),
        (lambda: conv(4, 6, groups=3), "in_channels must be a positive multiple of groups=3, got 4"),
        (lambda: conv(6, 4, groups=3), "out_channels must be a positive multiple of groups=3, got 4"),
        (lambda: conv(0, 4), "in_channels must be a positive multiple of groups=1, got 0"),
        (lambda: DeformConv2dPack(4, 6, 3, deform_groups=3), "in_channels must be a .* multiple of deform_groups=3"),
        (lambda: DeformConv2dPack(4, 6, 3, deform_groups=0), "multiple of deform_groups=0, got 4"),
        (lambda: DeformRoIPool(0), "output_size must be an integer from 1"),
        (lambda: DeformRoIPoolPack(7, 0), "output_channels must be at least 1, got 0"),
        (lambda: ModulatedDeformRoIPoolPack(7, 4, num_fcs=0), "num_fcs must be at least 1, got 0"),
        (lambda: pyramid([], DeformRoIPool(7)), "featmap_names must name at least one"),
        (lambda: pyramid(["0"], DeformRoIPool(7, 0.5)), "pool must have spatial_scale=1"),
    ],
)
def test_constructors_reject_wrong_arguments(constructor, message: str):
    with pytest.raises(ArgumentError, match=message):
        constructor()


def test_calls_reject_wrong_arguments():
    with pytest.raises(ShapeError, match=r"offset must be \[N=2"):
        DeformConv2d(4, 6, 3, padding=1)(image(), image(2, 18, 4, 4))
    with pytest.raises(DtypeError, match=r"offset must be a torch\.Tensor"):
        DeformConv2d(4, 6, 3)(image(), None)
    with pytest.raises(ShapeError, match=r"input must be \[N, C=4, H, W\], got shape \(2, 5, 9, 8\)"):
        DeformRoIPoolPack(3, 4)(image(2, 5, 9, 8), ROIS)
    with pytest.raises(DcnError, match="rois"):
        ModulatedDeformRoIPoolPack(3, 4, 8)(image(), ROIS[:, :4])
    module, (features, boxes, shapes) = layers()["shared pyramid"]
    with pytest.raises(ArgumentError, match=r"features must hold \['1'\], got \['0'\]"):
        module({"0": features["0"]}, boxes, shapes)
    with pytest.raises(ArgumentError, match="one entry for each image, got 2 and 1"):
        module(features, boxes, shapes[:1])
    with pytest.raises(ArgumentError, match="one entry for each image, got 0 and 0"):
        module(features, [], [])
    with pytest.raises(ArgumentError, match="must halve in size"):
        module({"0": features["0"], "1": image(2, 4, 8, 8)}, boxes, shapes)


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.ones(4, 9, 8), ShapeError, r"input must be \[N, C = 4, H, W\], got shape \(4, 9, 8\)"),
        (torch.ones(2, 5, 9, 8), ShapeError, r"input must be \[N, C = 4, H, W\], got shape \(2, 5, 9, 8\)"),
        (torch.ones(2, 4, 9, 8).double(), DtypeError, r"input must be torch\.float32 like .* got torch\.float64"),
        (np.ones((2, 4, 9, 8), np.float32), DtypeError, r"input must be a torch\.Tensor, got numpy\.ndarray"),
        (torch.ones(2, 4, 9, 1), ShapeError, r"input must have a padded width of at least .* = 5, got 1 \+ 2 = 3"),
    ],
    ids=["unbatched", "channels", "dtype", "array", "small"],
)
def test_packs_check_the_input_before_their_branch_runs(kind: type, given: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        kind(4, 6, 3, padding=1, dilation=2)(given)


@pytest.mark.parametrize("kind", [DeformConv2dPack, ModulatedDeformConv2dPack])
def test_fx_traces_convolution_layers(kind: type):
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), kind(4, 6, 3, padding=1), torch.nn.ReLU())
    traced = torch.fx.symbolic_trace(network)
    assert deform_conv2d in [step.target for step in traced.graph.nodes]
    x = image()
    assert torch.equal(traced(x), network(x))
    assert torch.equal(create_feature_extractor(network, ["1"])(x)["1"], network[:2](x))


@pytest.mark.parametrize("kind", [DeformRoIPoolPack, ModulatedDeformRoIPoolPack])
def test_fx_traces_pooling_layers(kind: type):
    pool, x = kind(2, 4, 8), image()
    traced = torch.fx.symbolic_trace(pool)
    assert deform_roi_pool in [step.target for step in traced.graph.nodes]
    assert torch.equal(traced(x, ROIS), pool(x, ROIS))
    with pytest.raises(DtypeError, match=r"input must be a torch\.Tensor, got builtins\.list"):
        pool([1.0], ROIS)


MODULES = Path(functional.__file__).parent.glob("*.py")
DOCUMENTED = sorted(path.stem for path in MODULES if ">>> " in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("onnx") else name for name in DOCUMENTED]
)
def test_docstring_examples(name: str):
    module = importlib.import_module(f"dcnops.adapters.torch.{name}")
    result = doctest.testmod(module, raise_on_error=False)
    assert result.attempted > 0 and result.failed == 0
