"""Replacements for the DCNv2 extension: names, checkpoint keys and values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dcnops import ArgumentError, DtypeError, ShapeError
from dcnops.adapters.torch import deform_conv2d, mmcv_ops, param_groups, rename_state_dict
from dcnops.adapters.torch.dcn_v2 import DCN, DCNPooling, DCNv2, DCNv2Pooling, dcn_v2_conv, dcn_v2_pooling

ROIS = torch.tensor(
    [
        [0, 1.5, 2.0, 9.5, 7.5],  # halves are rounded away from zero
        [1, 0.0, 0.0, 12.0, 10.0],
        [0, -3.0, -2.5, 5.0, 30.0],  # partly outside
        [1, 60.0, 60.0, 70.0, 70.0],  # outside: zero
        [0, 6.0, 7.0, 4.0, 3.0],  # inverted
    ]
)


# Convolution


def excited(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    return layer


def test_convolution():
    x, offset, mask = torch.randn(2, 4, 7, 6), torch.randn(2, 36, 4, 3), torch.rand(2, 18, 4, 3)
    layer = excited(DCNv2(4, 6, (3, 3), 2, 1, deformable_groups=2))
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, 2, 1, mask=mask)
    assert torch.equal(layer(x, offset, mask), expected)
    numbers = (layer.weight, layer.bias, (2, 2), (1, 1), (1, 1), 2)
    assert torch.equal(dcn_v2_conv(x, offset, mask, *numbers), expected)
    with pytest.raises(ShapeError, match="for deform_groups=2"):
        layer(x, offset[:, :18], mask)


def test_layer_predicts_offsets_and_masks():
    x = torch.randn(2, 4, 7, 6)
    layer = DCN(4, 6, kernel_size=(3, 3), stride=1, padding=1, dilation=1, deformable_groups=2)
    assert layer.weight.abs().max() <= 1 / 6 and not layer.bias.any()
    plain = torch.nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(layer(x), plain / 2)
    assert list(layer.state_dict()) == ["weight", "bias", "conv_offset_mask.weight", "conv_offset_mask.bias"]
    excited(layer)
    first, second, logits = layer.conv_offset_mask(x).chunk(3, dim=1)
    expected = dcn_v2_conv(x, torch.cat((first, second), 1), logits.sigmoid(), layer.weight, layer.bias, 1, 1, 1, 2)
    torch.testing.assert_close(layer(x), expected)
    layer.init_offset()
    assert not layer.conv_offset_mask.weight.any() and not layer.conv_offset_mask.bias.any() and layer.bias.any()
    with pytest.raises(ShapeError, match=r"input must be \[N, C = 4, H, W\], got shape \(2, 3, 7, 6\)"):
        layer(x[:, :3])


def test_branch_has_no_dilation():
    """With dilation, the branch therefore predicts more rows and columns than the layer needs."""
    x, layer = torch.randn(2, 4, 9, 8), excited(DCN(4, 6, 3, 1, 2, dilation=2))
    values = layer.conv_offset_mask(x)
    assert values.shape == (2, 27, 11, 10)
    offset = values[:, :18].flatten(1)[:, : 18 * 72].reshape(2, 18, 9, 8)
    mask = values[:, 18:].flatten(1)[:, : 9 * 72].reshape(2, 9, 9, 8).sigmoid()
    expected = deform_conv2d(x, offset, layer.weight, layer.bias, 1, 2, 2, mask)
    torch.testing.assert_close(layer(x), expected)


def test_checkpoints_and_parameter_groups():
    theirs, ours = excited(DCN(4, 6, 3, 1, 1)), mmcv_ops.ModulatedDeformConv2dPack(4, 6, 3, padding=1)
    x = torch.randn(1, 4, 6, 6)
    ours.load_state_dict(rename_state_dict(theirs.state_dict(), ours))
    assert torch.equal(ours(x), theirs(x))
    network = nn.Sequential(DCN(4, 6, 3, 1, 1))
    network.load_state_dict(rename_state_dict(nn.Sequential(ours).state_dict(), network))
    assert torch.equal(network(x), theirs(x))
    assert [(len(group["params"]), group["lr"]) for group in param_groups(network, 1.0)] == [(2, 1.0), (2, 0.1)]


# Pooling


def pool_by_definition(
    x: np.ndarray, rois: np.ndarray, trans: np.ndarray | None, grad_out: np.ndarray, **numbers: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Compute the output and the gradients of `x` and `trans` of deformable position-sensitive pooling."""
    scale, P, D, groups, part, samples, std = numbers.values()
    H, W = x.shape[2:]
    output, grad_x = np.zeros(grad_out.shape), np.zeros(x.shape)
    grad_trans = None if trans is None else np.zeros(trans.shape)
    for r, channel, ph, pw in np.ndindex(*grad_out.shape):
        image, *corners = rois[r]
        x1, y1, x2, y2 = (math.copysign(math.floor(abs(c) + 0.5), c) for c in corners)
        left, top = x1 * scale - 0.5, y1 * scale - 0.5
        width = max((x2 + 1) * scale - 0.5 - left, 0.1)
        height = max((y2 + 1) * scale - 0.5 - top, 0.1)
        dx = dy = 0.0
        if trans is not None:
            kind = channel // (D // (trans.shape[1] // 2))
            cell = (ph * part // P, pw * part // P)
            dx, dy = std * trans[(r, 2 * kind, *cell)], std * trans[(r, 2 * kind + 1, *cell)]
        plane = (int(image), (channel * groups + ph * groups // P) * groups + pw * groups // P)
        found = []
        for i, j in np.ndindex(samples, samples):
            h = top + (ph + i / samples) * height / P + dy * height
            w = left + (pw + j / samples) * width / P + dx * width
            if -0.5 <= w <= W - 0.5 and -0.5 <= h <= H - 0.5:
                found.append((min(max(h, 0.0), H - 1.0), min(max(w, 0.0), W - 1.0)))
        for h, w in found:
            rows, columns = (math.floor(h), math.ceil(h)), (math.floor(w), math.ceil(w))
            a, b = h - rows[0], w - columns[0]
            share = grad_out[r, channel, ph, pw] / len(found)
            corner = x[plane][np.ix_(rows, columns)]
            weights = np.outer((1 - a, a), (1 - b, b))
            output[r, channel, ph, pw] += (corner * weights).sum() / len(found)
            for (m, row), (n, column) in ((m, n) for m in enumerate(rows) for n in enumerate(columns)):
                grad_x[(*plane, row, column)] += weights[m, n] * share
            if grad_trans is not None:
                along_x = (1 - a) * (corner[0, 1] - corner[0, 0]) + a * (corner[1, 1] - corner[1, 0])
                along_y = (1 - b) * (corner[1, 0] - corner[0, 0]) + b * (corner[1, 1] - corner[0, 1])
                grad_trans[(r, 2 * kind, *cell)] += along_x * std * width * share
                grad_trans[(r, 2 * kind + 1, *cell)] += along_y * std * height * share
    return output, grad_x, grad_trans


@pytest.mark.parametrize(
    ("classes", "groups", "part", "dtype"),
    [
        (None, 1, None, torch.float64),
        (1, 1, None, torch.float64),
        (1, 1, None, torch.float32),
        (2, 2, 2, torch.float64),
        (1, 3, 5, torch.float64),
    ],
)
def test_pooling_follows_the_definition(classes: int | None, groups: int, part: int | None, dtype: torch.dtype):
    D, P = 4, 3
    size = P if part is None else part
    x = torch.randn(2, D * groups**2, 6, 7, dtype=dtype, requires_grad=True)
    trans = torch.randn(len(ROIS), 2 * (classes or 1), size, size, dtype=dtype, requires_grad=True)
    grad_out = torch.randn(len(ROIS), D, P, P, dtype=dtype)
    numbers = {"scale": 0.5, "P": P, "D": D, "groups": groups, "part": size, "samples": 2, "std": 0.3}
    given = None if classes is None else trans.detach().double().numpy()
    expected = pool_by_definition(
        x.detach().double().numpy(), ROIS.double().numpy(), given, grad_out.double().numpy(), **numbers
    )
    output = dcn_v2_pooling(x, ROIS.to(dtype), trans, 0.5, P, D, classes is None, groups, part, 2, 0.3)
    assert output.dtype == dtype and not output[3].any()
    output.backward(grad_out)
    gradients = (output.detach(), x.grad, trans.grad)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for result, reference in zip(gradients, expected):
        assert (result is None) == (reference is None)
        if result is not None:
            np.testing.assert_allclose(result.numpy(), reference, rtol=tolerance, atol=tolerance)


def test_pooling_layers():
    x, rois = torch.randn(2, 4, 12, 14, dtype=torch.float64), ROIS.double()
    numbers = {"spatial_scale": 0.5, "pooled_size": 3, "output_dim": 4, "sample_per_part": 2, "trans_std": 0.2}
    offset = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    plain = dcn_v2_pooling(x, rois, x.new_empty(0), 0.5, 3, 4, True, sample_per_part=2)
    for no_trans in (True, False):
        layer = DCNv2Pooling(no_trans=no_trans, **numbers)
        expected = dcn_v2_pooling(x, rois, offset, 0.5, 3, 4, no_trans, 1, None, 2, 0.2)
        assert torch.equal(layer(x, rois, offset), expected)
    assert torch.equal(DCNPooling(no_trans=True, **numbers)(x, rois), plain)
    pool = DCNPooling(no_trans=False, deform_fc_dim=8, **numbers).double()
    torch.testing.assert_close(pool(x, rois), plain / 2)
    assert list(pool.state_dict()) == [f"offset_mask_fc.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")]
    excited(pool)
    first, second, logits = pool.offset_mask_fc(plain.flatten(1)).reshape(5, 3, 3, 3).chunk(3, dim=1)
    moved = dcn_v2_pooling(x, rois, torch.cat((first, second), 1), 0.5, 3, 4, False, 1, None, 2, 0.2)
    output = pool(x, rois)
    torch.testing.assert_close(output, moved * logits.sigmoid())
    output.sum().backward()
    assert all(parameter.grad.any() for parameter in pool.parameters())
    assert pool(x, rois[:0]).shape == (0, 4, 3, 3)


def test_pooling_of_16_bit_maps():
    x, offset = torch.randn(2, 4, 6, 7).bfloat16(), torch.randn(5, 2, 3, 3).bfloat16()
    numbers = (0.5, 3, 4, False, 1, None, 2, 0.3)
    output = dcn_v2_pooling(x, ROIS, offset, *numbers)
    assert torch.equal(output, dcn_v2_pooling(x.float(), ROIS, offset.float(), *numbers).bfloat16())


def test_pooling_rejects_wrong_arguments():
    x, offset = torch.randn(2, 4, 6, 7), torch.zeros(5, 2, 3, 3)

    def pool(x: Any = x, rois: Any = ROIS, offset: Any = offset, size: int = 3, groups: int = 1, samples: int = 4):
        return dcn_v2_pooling(x, rois, offset, 0.5, size, 4, False, groups, None, samples, 0.1)

    beyond = ROIS.clone()
    beyond[2, 0] = 2
    for call, error, message in (
        ({"x": x[:, :3]}, ShapeError, r"input must be \[N, output_dim\*group_size\*\*2=4, .* got shape \(2, 3, 6, 7\)"),
        ({"groups": 2}, ShapeError, r"group_size\*\*2=16"),
        ({"rois": ROIS[:, 1:]}, ShapeError, r"rois must be \[R, 5\]"),
        ({"offset": offset[:4]}, ShapeError, r"offset must be \[R=5, 2\*K, part_size=3, .* got shape \(4, 2, 3, 3\)"),
        ({"offset": offset.repeat(1, 3, 1, 1)}, ShapeError, "K a divisor of output_dim=4"),
        ({"size": 0}, ArgumentError, "pooled_size must be at least 1, got 0"),
        ({"samples": 0}, ArgumentError, "sample_per_part must be at least 1, got 0"),
        ({"rois": ROIS.long()}, DtypeError, r"rois must be a floating-point torch\.Tensor, got torch\.int64"),
        ({"offset": offset.numpy()}, DtypeError, r"offset must be .* got numpy\.ndarray"),
        ({"rois": beyond}, ArgumentError, "indices of feature maps from 0 to N-1=1"),
    ):
        with pytest.raises(error, match=message):
            pool(**call)
