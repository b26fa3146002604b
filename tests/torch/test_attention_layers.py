"""Layers of deformable attention and aggregation: formulas, initial weights, checkpoints of other projects."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcnops import ArgumentError, ShapeError
from dcnops.adapters.torch import DCNv3, DCNv4, MSDeformAttn, deform_aggregate, deform_conv2d
from tests.torch.attention_reference import SHAPES, attention_by_grid_sample

PIXELS = sum(h * w for h, w in SHAPES)


def randomise(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    return layer


def attention_inputs(coordinates: int, levels: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 5, 16), torch.rand(2, 5, levels, coordinates), torch.randn(2, PIXELS, 16)


@pytest.mark.parametrize("points", [3, [3, 5]])
@pytest.mark.parametrize("coordinates", [2, 4])
@pytest.mark.parametrize("levels", [1, 2])
def test_attention_follows_the_formula(points: int | list[int], coordinates: int, levels: int):
    layer: Any = randomise(MSDeformAttn(16, n_levels=2, n_heads=4, n_points=points))
    query, reference, value = attention_inputs(coordinates, levels)
    padding = torch.rand(2, PIXELS) < 0.3
    numbers = [points] * 2 if isinstance(points, int) else points
    values = layer.value_proj(value) * ~padding[..., None]
    offsets = layer.sampling_offsets(query).reshape(2, 5, 4, sum(numbers), 2).split(numbers, 3)
    weights = layer.attention_weights(query).reshape(2, 5, 4, sum(numbers)).softmax(-1)
    locations = []
    for level, (offset, n, (h, w)) in enumerate(zip(offsets, numbers, SHAPES)):
        x, y, *box = reference[:, :, level % levels].unbind(-1)
        size = torch.stack(box, -1)[:, :, None, None] / n / 2 if box else 1 / torch.tensor([w, h])
        locations.append(torch.stack([x, y], -1)[:, :, None, None] + offset * size)
    attended = attention_by_grid_sample(values.unflatten(2, (4, 4)), SHAPES, torch.cat(locations, 3), weights, numbers)
    output = layer(query, reference, value, SHAPES, padding)
    torch.testing.assert_close(output, layer.output_proj(attended), rtol=1e-4, atol=1e-5)
    assert torch.equal(output, layer(query, reference, value, torch.tensor(SHAPES), padding))
    output.square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())


def test_attention_starts_as_in_the_paper():
    """Eight heads look in eight directions, at 1, 2, ... pixels; sideways as far as along the diagonals."""
    layer = MSDeformAttn(16, n_levels=2, n_heads=8, n_points=[1, 3])
    bias = layer.sampling_offsets.bias.detach().reshape(8, 4, 2)
    directions = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    torch.testing.assert_close(bias, directions[:, None] * torch.tensor([1.0, 1, 2, 3])[:, None], atol=1e-6, rtol=1e-6)
    assert not layer.sampling_offsets.weight.any()
    assert not layer.attention_weights.weight.any() and not layer.attention_weights.bias.any()
    bound = math.sqrt(6 / 32)
    for projection in (layer.value_proj, layer.output_proj):
        assert not projection.bias.any() and 0.9 * bound < projection.weight.abs().max() <= bound
    assert list(layer.state_dict()) == [
        f"{name}.{leaf}"
        for name in ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
        for leaf in ("weight", "bias")
    ]


def test_attention_keeps_locations_in_float32():
    """A location on a map 300 pixels wide is off by less than a thousandth of a pixel in a bfloat16 network."""
    shapes = [(1, 300)]
    layer = MSDeformAttn(8, n_levels=1, n_heads=1, n_points=1).bfloat16()
    with torch.no_grad():
        for projection in (layer.value_proj, layer.output_proj):
            projection.weight.copy_(torch.eye(8))
        layer.sampling_offsets.bias.zero_()
    value = torch.zeros(1, 300, 8, dtype=torch.bfloat16)
    value[0, 150:] = 1
    reference = torch.full((1, 1, 1, 2), 0.5)
    reference[..., 0] = (149.75 + 0.5) / 300  # three quarters of the way from pixel 149 to pixel 150
    output = layer(value.new_zeros(1, 1, 8), reference, value, shapes)
    assert output.dtype == torch.bfloat16 and (output.float() - 0.75).abs().max() < 2**-9


@pytest.mark.slow
def test_attention_under_autocast_and_compilation():
    layer = randomise(MSDeformAttn(16, n_levels=2, n_heads=4, n_points=3))
    arguments = attention_inputs(2)
    expected = layer(*arguments, SHAPES)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for shapes in (SHAPES, torch.tensor(SHAPES)):
        torch.testing.assert_close(compiled(*arguments, shapes), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(*arguments, SHAPES)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)


def test_attention_refuses_wrong_arguments():
    with pytest.raises(ArgumentError, match="d_model must be a positive multiple of n_heads=3"):
        MSDeformAttn(16, n_heads=3)
    for points in (0, [4], [4, -1], 2.5):
        with pytest.raises(ArgumentError, match="points must be a positive integer or a sequence of L=2 positive"):
            MSDeformAttn(16, n_levels=2, n_points=points)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"d_model must be a positive multiple of n_heads=4\.0"):
        MSDeformAttn(16, n_heads=4.0)  # type: ignore[arg-type]
    for levels in (0, 65):
        with pytest.raises(ArgumentError, match=f"levels must be an integer from 1 to 64, got {levels}"):
            MSDeformAttn(16, n_levels=levels)
    layer = MSDeformAttn(16, n_levels=2, n_heads=4)
    query, reference, value = attention_inputs(2)
    for wrong in (reference[..., :1], reference[:, :, 0], reference.repeat(1, 1, 2, 1), reference[:, :4]):
        with pytest.raises(ShapeError, match=r"reference_points must be \[N=2, Lq=5, L=2, 2 or 4\], or"):
            layer(query, wrong, value, SHAPES)
    for wrong in (query[0], query[..., :15]):
        with pytest.raises(ShapeError, match=r"query must be \[N, Lq, C=16\], got"):
            layer(wrong, reference, value, SHAPES)
    for wrong in (value[0], value[:1], value[..., :15]):
        with pytest.raises(ShapeError, match=r"value must be \[N=2, S, C=16\], got"):
            layer(query, reference, wrong, SHAPES)
    for shapes in (SHAPES[:1], torch.tensor(SHAPES[0])):
        with pytest.raises(ShapeError, match=r"spatial_shapes must be L=2 pairs \(height, width\), got"):
            layer(query, reference, value, shapes)
    with pytest.raises(ShapeError, match=rf"the padding mask must be \[N=2, S={PIXELS}\], got shape \(2, 3\)"):
        layer(query, reference, value, SHAPES, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ShapeError, match="spatial_shapes must have a sum of height"):
        layer(query, reference, value[:, 1:], SHAPES)


INTERNIMAGE = {
    "dw_conv.0.weight": (8, 1, 5, 5), "dw_conv.0.bias": (8,), "dw_conv.1.1.weight": (8,), "dw_conv.1.1.bias": (8,),
    "offset.weight": (32, 8), "offset.bias": (32,), "mask.weight": (16, 8), "mask.bias": (16,),
    "input_proj.weight": (8, 8), "input_proj.bias": (8,), "output_proj.weight": (8, 8), "output_proj.bias": (8,),
    "center_feature_scale_proj_weight": (2, 8), "center_feature_scale_proj_bias": (2,),
}  # fmt: skip
DCNV4 = {
    "offset_mask_dw.weight": (8, 1, 3, 3), "offset_mask_dw.bias": (8,), "offset_mask.weight": (56, 8),
    "offset_mask.bias": (56,), "value_proj.weight": (8, 8), "value_proj.bias": (8,), "output_proj.weight": (8, 8),
}  # fmt: skip


def checkpoint(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}


def depthwise(image: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """Convolve [N, H, W, C] depthwise with padding that keeps its size."""
    weight = state[f"{name}.weight"]
    result = nn.functional.conv2d(
        image.permute(0, 3, 1, 2), weight, state[f"{name}.bias"], padding=weight.shape[-1] // 2, groups=8
    )
    return result.permute(0, 2, 3, 1)


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return nn.functional.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def aggregate_by_convolution(image: Tensor, offset: Tensor, mask: Tensor, taps: list[tuple[int, int]], scale: float):
    """Sum over the taps of one group after another, each a deformable convolution with a 1x1 kernel."""
    N, H, W, C = image.shape
    output = image.new_zeros(N, C, H, W)
    offsets, masks = offset.reshape(N, H, W, 2, len(taps), 2), mask.reshape(N, H, W, 2, len(taps))
    for k, (row, column) in enumerate(taps):
        # The 3x3 kernel with padding 1 reaches from -1 to 1; the scale stretches it and the offsets.
        shift_y = scale * (row - 1 + offsets[:, :, :, :, k, 1])
        shift_x = scale * (column - 1 + offsets[:, :, :, :, k, 0])
        shift = torch.stack([shift_y, shift_x], -1).flatten(3).permute(0, 3, 1, 2)
        ones = torch.ones(C, 1, 1, 1)
        output = output + deform_conv2d(image.permute(0, 3, 1, 2), shift, ones, mask=masks[..., k].permute(0, 3, 1, 2))
    return output.permute(0, 2, 3, 1)


COLUMN_MAJOR = [(row, column) for column in range(3) for row in range(3)]


def test_dcnv3_computes_checkpoints_of_internimage():
    options = {"channels": 8, "group": 2, "dw_kernel_size": 5, "offset_scale": 0.5}
    layer, state, image = (
        DCNv3(**options, center_feature_scale=True, remove_center=True),
        checkpoint(INTERNIMAGE),
        torch.randn(2, 5, 6, 8),
    )  # type: ignore[arg-type]
    layer.load_state_dict(state)
    features = depthwise(image, state, "dw_conv.0")
    norm = (features - features.mean(-1, True)) / (features.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    features = nn.functional.gelu(norm * state["dw_conv.1.1.weight"] + state["dw_conv.1.1.bias"])
    projected = linear(image, state, "input_proj")
    mask = linear(features, state, "mask").unflatten(-1, (2, 8)).softmax(-1)
    taps = [tap for tap in COLUMN_MAJOR if tap != (1, 1)]
    output = aggregate_by_convolution(projected, linear(features, state, "offset"), mask, taps, 0.5)
    scales = (state[f"center_feature_scale_proj_{leaf}"] for leaf in ("weight", "bias"))
    share = nn.functional.linear(features, *scales).sigmoid()
    share = share[..., None].expand(2, 5, 6, 2, 4).flatten(3)
    expected = linear(output * (1 - share) + projected * share, state, "output_proj")
    torch.testing.assert_close(layer(image), expected, rtol=1e-4, atol=1e-5)


def test_dcnv4_computes_checkpoints_of_its_package():
    layer, state, image = (
        DCNv4(8, group=2, dw_kernel_size=3, output_bias=False),
        checkpoint(DCNV4),
        torch.randn(2, 5, 6, 8),
    )
    layer.load_state_dict(state)
    packed = linear(depthwise(image, state, "offset_mask_dw"), state, "offset_mask")[..., :54].unflatten(-1, (2, 27))
    offset, mask = packed.split([18, 9], -1)
    output = aggregate_by_convolution(linear(image, state, "value_proj"), offset, mask, COLUMN_MAJOR, 1.0)
    expected = linear(output, state, "output_proj").flatten(1, 2)
    actual = layer(image.flatten(1, 2), shape=(5, 6))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match=r"input must be \[N, H\*W=25, C\] for shape \(5, 5\), got shape \(2, 30, 8\)"):
        layer(image.flatten(1, 2))


def test_initial_dcnv3_and_dcnv4():
    image = torch.randn(1, 6, 6, 8)
    layer = DCNv3(8, group=2, norm_layer="BN", act_layer="SiLU")
    mean = deform_aggregate(
        layer.input_proj(image),
        torch.zeros(1, 6, 6, 36),
        torch.full((1, 6, 6, 18), 1 / 9),
        groups=2,
        kernel_size=3,
        padding=1,
    )
    torch.testing.assert_close(layer(image), layer.output_proj(mean))
    assert set(layer.state_dict()) > {"dw_conv.1.0.running_mean"}
    plain = DCNv4(8, group=2, without_pointwise=True)
    assert not plain(image.flatten(1, 2)).any() and list(plain.state_dict()) == [
        "offset_mask.weight",
        "offset_mask.bias",
    ]


@pytest.mark.parametrize("kind", [DCNv3, DCNv4])
def test_strides_and_gradients_of_aggregating_layers(kind: type[nn.Module]):
    layer = randomise(kind(8, group=2, stride=2, center_feature_scale=True))
    image = torch.randn(2, 7, 10, 8)
    output = layer(image) if kind is DCNv3 else layer(image.flatten(1, 2), (7, 10)).unflatten(1, (4, 5))
    assert output.shape == (2, 4, 5, 8)
    output.square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.parameters())
    for wrong in (image[0, 0], image[..., :7] if kind is DCNv3 else image[..., :7].flatten(1, 2)):
        with pytest.raises(ShapeError, match=r"^input must be \[N, .*C=8\], got shape"):
            layer(wrong)
    dilated = kind(8, group=2, dilation=2)
    with pytest.raises(ShapeError, match=r"pad must keep the size of images, as .*=2 does, got 1: "):
        dilated(image[:, :6, :6] if kind is DCNv3 else image[:, :6, :6].flatten(1, 2))
    with pytest.raises(ArgumentError, match="channels must be a positive multiple of group=3"):
        kind(8, group=3)
    for size in (1, 2):
        with pytest.raises(ArgumentError, match=f"kernel_size must be odd and above 1 with .*, got {size}"):
            kind(8, kernel_size=size, remove_center=True)
    for name, wrong in (
        ("kernel_size", (3, 3)),
        ("stride", 0),
        ("pad", -1),
        ("dilation", 1.0),
        ("offset_scale", math.nan),
    ):
        with pytest.raises(ArgumentError, match=f"^{name} must be"):
            kind(8, **{name: wrong})
    with pytest.raises(ArgumentError, match="act_layer must be one of"):
        DCNv3(8, act_layer="tanh")
