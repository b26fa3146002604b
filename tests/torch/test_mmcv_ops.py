"""Replacements for mmcv.ops: names, signatures, initial weights, checkpoint keys and values."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn

import dcnops.adapters.torch as ours
from dcnops import ArgumentError, DtypeError, ShapeError
from dcnops.adapters.torch import mmcv_ops

NUMBERS = "stride=1 padding=0 dilation=1 groups=1 deform_groups=1"
CONV = f"in_channels out_channels kernel_size {NUMBERS}"
ROI = "output_size output_channels deform_fc_channels=1024 spatial_scale=1.0 sampling_ratio=0 gamma=0.1"
# Arguments and defaults of mmcv 2.
SIGNATURES = {
    "deform_conv2d": f"input offset weight {NUMBERS} bias=False im2col_step=32",
    "modulated_deform_conv2d": f"input offset mask weight bias=None {NUMBERS}",
    "deform_roi_pool": "input rois offset output_size spatial_scale=1.0 sampling_ratio=0 gamma=0.1",
    "DeformConv2d": f"{CONV} bias=False im2col_step=32",
    "DeformConv2dPack": f"{CONV} bias=False im2col_step=32",
    "ModulatedDeformConv2d": f"{CONV} bias=True",
    "ModulatedDeformConv2dPack": f"{CONV} bias=True",
    "DeformRoIPool": "output_size spatial_scale=1.0 sampling_ratio=0 gamma=0.1",
    "DeformRoIPoolPack": ROI,
    "MultiScaleDeformableAttention": "embed_dims=256 num_heads=8 num_levels=4 num_points=4 im2col_step=64 dropout=0.1 "
    "batch_first=False norm_cfg=None init_cfg=None value_proj_ratio=1.0",
    "MultiScaleDeformableAttnFunction": "",
    "multi_scale_deformable_attn_pytorch": "value value_spatial_shapes sampling_locations attention_weights",
    "ModulatedDeformRoIPoolPack": ROI,
}


@pytest.mark.parametrize("name", [name for name in mmcv_ops.__all__ if name != "install"])
def test_signatures(name: str):
    parameters = inspect.signature(getattr(mmcv_ops, name)).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    signature = [
        parameter.name if parameter.default is inspect.Parameter.empty else f"{parameter.name}={parameter.default}"
        for parameter in positional
    ]
    assert " ".join(signature) == SIGNATURES[name]


def conv_arrays(deform_groups: int = 2):
    x, weight = torch.randn(2, 4, 7, 6), torch.randn(6, 2, 3, 3)
    return x, torch.randn(2, 18 * deform_groups, 7, 6), torch.rand(2, 9 * deform_groups, 7, 6), weight


def test_functions():
    x, offset, mask, weight = conv_arrays()
    bias = torch.randn(6)
    torch.testing.assert_close(
        mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2, False, 64),
        ours.deform_conv2d(x, offset, weight, padding=1),
    )
    torch.testing.assert_close(
        mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 1, 1, 1, 2, 2),
        ours.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask),
    )
    rois, shift = torch.tensor([[1, 0.0, 1.0, 9.0, 8.0]]), torch.randn(1, 2, 3, 3)
    for offset in (shift, None):
        torch.testing.assert_close(
            mmcv_ops.deform_roi_pool(x, rois, offset, (3, 3), 0.5, 0, 0.2),
            ours.deform_roi_pool(x, rois, offset, output_size=3, spatial_scale=0.5, sampling_ratio=0, gamma=0.2),
        )


def test_functions_reject_wrong_arguments():
    x, offset, mask, weight = conv_arrays()
    with pytest.raises(ArgumentError, match="bias must be False"):
        mmcv_ops.deform_conv2d(x, offset, weight, 1, 1, 1, 2, 2, True)
    with pytest.raises(ShapeError, match=r"input must be \[N, C=2, H, W\] for groups=1 .* got shape \(2, 4, 7, 6\)"):
        mmcv_ops.deform_conv2d(x, offset, weight, 1, 1)
    with pytest.raises(ShapeError, match=r"offset must be \[N, 18, oh, ow\] for deform_groups=1 .* got shape \(2, 36"):
        mmcv_ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1, 1, 2, 1)
    with pytest.raises(ShapeError, match="input must have 4 dimensions"):
        mmcv_ops.deform_conv2d(x[0], offset, weight)
    with pytest.raises(DtypeError, match=r"input must be a torch\.Tensor, got builtins\.list"):
        mmcv_ops.deform_conv2d(x.tolist(), offset, weight)
    with pytest.raises(ArgumentError, match="multiple of deform_groups=3"):
        mmcv_ops.DeformConv2d(4, 6, 3, deform_groups=3)
    with pytest.raises(ShapeError, match="for deform_groups=1"):
        mmcv_ops.DeformConv2d(4, 6, 3, padding=1)(x, offset)
    for kind in (mmcv_ops.DeformConv2d, mmcv_ops.DeformConv2dPack):
        for options, message in (({"bias": True}, "bias must be False"), ({"groups": 3}, "multiple of groups=3")):
            with pytest.raises(ArgumentError, match=message) as caught:
                kind(4, 6, 3, **options)
            assert isinstance(caught.value, AssertionError)  # what mmcv raises


def test_convolutions():
    x, offset, mask, _ = conv_arrays()
    layer = mmcv_ops.DeformConv2d(4, 6, 3, 1, 1, 1, 2, 2)
    expected = ours.deform_conv2d(x, offset, layer.weight, padding=1)
    torch.testing.assert_close(layer(x, offset), expected)
    layer = mmcv_ops.ModulatedDeformConv2d(4, 6, 3, 1, 1, 1, 2, 2)
    expected = ours.deform_conv2d(x, offset, layer.weight, layer.bias, padding=1, mask=mask)
    torch.testing.assert_close(layer(x, offset, mask), expected)


CONVOLUTIONS = [getattr(mmcv_ops, name) for name in mmcv_ops.__all__ if "Conv2d" in name]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_layers_are_convolutions_to_mmcv(kind: type[nn.Module]):
    """ConvModule reads the attributes of torch's convolution, mmengine's optimisers ask for the base class."""
    layer, regular = kind(4, 4, 3), nn.Conv2d(4, 4, 3)
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(layer, name) == getattr(regular, name)
    assert (layer.transposed, layer.output_padding) == (False, (0, 0))
    v1 = isinstance(layer, mmcv_ops.DeformConv2d)
    assert v1 != isinstance(layer, mmcv_ops.ModulatedDeformConv2d)
    assert hasattr(layer, "bias") == hasattr(layer, "init_weights") == (not v1)
    assert "bias=False" in repr(layer) if v1 else "bias" not in repr(layer)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_old_name_of_deform_groups(kind: type[nn.Module]):
    with pytest.warns(DeprecationWarning, match="old name of deform_groups") as told:
        layer = kind(4, 4, 3, deformable_groups=2)
    assert layer.deform_groups == 2 and told[0].filename == __file__
    if hasattr(layer, "conv_offset"):
        assert layer.conv_offset.out_channels in (36, 54)
    with pytest.warns(DeprecationWarning), pytest.raises(ArgumentError, match="got 4 and 2"):
        kind(4, 4, 3, deform_groups=4, deformable_groups=2)


def test_init_weights_initialises_the_whole_layer():
    layer = mmcv_ops.ModulatedDeformConv2dPack(4, 6, 3)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 9)
    layer.init_weights()
    assert 0 < layer.weight.abs().max() <= 1 / 6 and not layer.bias.any()
    assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()


def test_larger_offsets():
    """mmcv reads the offsets of an image from its buffer as if they had the size of the output."""
    x, weight = torch.randn(2, 4, 8, 9), torch.randn(6, 4, 3, 3)
    offset, mask = torch.randn(2, 18, 8, 9, requires_grad=True), torch.rand(2, 9, 8, 9)
    first = offset.detach().numpy().reshape(2, -1)[:, : 18 * 20].reshape(2, 18, 4, 5)
    masks = mask.numpy().reshape(2, -1)[:, : 9 * 20].reshape(2, 9, 4, 5)
    expected = ours.deform_conv2d(x, torch.from_numpy(first), weight, None, 2, 1, mask=torch.from_numpy(masks))
    call = functools.partial(mmcv_ops.modulated_deform_conv2d, weight=weight, stride=2, padding=1)
    output = call(x, offset, mask, allow_larger_offsets=True)
    assert torch.equal(output, expected)
    output.sum().backward()
    used = offset.grad.flatten(1).split([18 * 20, 18 * 52], dim=1)
    assert used[0].any() and not used[1].any()
    # Offsets of the right size, and masks alone.
    fitting = offset[:, :, :4, :5].detach()
    same = ours.deform_conv2d(x, fitting, weight, None, 2, 1, mask=torch.from_numpy(masks))
    assert torch.equal(call(x, fitting, mask, allow_larger_offsets=True), same)
    for given in ((offset, mask), (fitting, mask)):
        with pytest.raises(ShapeError, match=r"oh=4, ow=5\], got .*; with allow_larger_offsets=True, the first values"):
            call(x, *given)
    for option in (False, True):
        with pytest.raises(ShapeError, match=r"offset must be .*\(2, 18, 3, 5\)$"):
            call(x, offset[:, :, :3, :5], mask, allow_larger_offsets=option)
    layer = mmcv_ops.ModulatedDeformConv2d(4, 6, 3, 2, 1, bias=False, allow_larger_offsets=True)
    layer.weight = nn.Parameter(weight)
    assert torch.equal(layer(x, offset, mask), expected)
    layer.allow_larger_offsets = False
    with pytest.raises(ShapeError, match="allow_larger_offsets"):
        layer(x, offset, mask)
    for layer.allow_larger_offsets, given in ((True, offset), (False, fitting)):
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x, given, mask[:, :, :4, :5]), layer(x, given, mask[:, :, :4, :5]))


def test_initial_weights():
    """Kaiming's rule in v1, 1/sqrt(C*K) regardless of groups in v2; biases and branches are zero."""
    v1 = mmcv_ops.DeformConv2dPack(32, 64, 3, groups=2)
    v2 = mmcv_ops.ModulatedDeformConv2dPack(32, 64, 3, groups=2)
    for layer, bound in ((v1, (6 / (16 * 9)) ** 0.5), (v2, 1 / (32 * 9) ** 0.5)):
        largest = layer.weight.abs().max().item()
        assert 0.98 * bound < largest <= bound
        assert not layer.conv_offset.weight.any() and not layer.conv_offset.bias.any()
    assert not v2.bias.any()


def test_state_dict_keys():
    keys = {"weight", "conv_offset.weight", "conv_offset.bias"}
    assert set(mmcv_ops.DeformConv2dPack(4, 4, 3).state_dict()) == keys
    assert set(mmcv_ops.ModulatedDeformConv2dPack(4, 4, 3).state_dict()) == keys | {"bias"}
    widths = {"offset_fc.0": (8, 36), "offset_fc.2": (8, 8), "offset_fc.4": (18, 8)}
    widths |= {"mask_fc.0": (8, 36), "mask_fc.2": (9, 8)}
    expected = {f"{layer}.weight": shape for layer, shape in widths.items()}
    expected |= {f"{layer}.bias": shape[:1] for layer, shape in widths.items()}
    state = mmcv_ops.ModulatedDeformRoIPoolPack(3, 4, 8).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected


@pytest.mark.parametrize("kind", [mmcv_ops.DeformRoIPoolPack, mmcv_ops.ModulatedDeformRoIPoolPack])
def test_roi_pooling(kind: type[nn.Module]):
    x, rois = torch.randn(2, 4, 8, 8), torch.tensor([[1, 0.0, 1.0, 9.0, 8.0], [0, 2.0, 2.0, 7.0, 5.0]])
    pool = kind(3, 4, 8, spatial_scale=0.5, gamma=0.2)
    plain = mmcv_ops.DeformRoIPool(3, 0.5)(x, rois)
    modulated = kind is mmcv_ops.ModulatedDeformRoIPoolPack
    torch.testing.assert_close(pool(x, rois), plain / 2 if modulated else plain)
    with torch.no_grad():
        for parameter in pool.parameters():
            parameter.uniform_(-0.5, 0.5)
    features = plain.flatten(1)
    # Like mmcv, apply the mask after pooling.
    mask = pool.mask_fc(features).sigmoid().reshape(2, 1, 3, 3) if modulated else 1
    offset = pool.offset_fc(features).reshape(2, 2, 3, 3)
    expected = mmcv_ops.deform_roi_pool(x, rois, offset, 3, 0.5, 0, 0.2) * mask
    output = pool(x, rois)
    torch.testing.assert_close(output, expected)
    output.square().sum().backward()
    assert all(parameter.grad.any() for parameter in pool.parameters())
