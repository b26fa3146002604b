"""Replacements for the deformable functions and layers of ``mmcv.ops``, under the same names.

Write ``from dcnops.adapters.torch.mmcv_ops import DeformConv2dPack`` instead of ``from mmcv.ops import
DeformConv2dPack``. Arguments, defaults, initial weights, the order of offset channels and checkpoint keys are those of
mmcv. Common differences:

- `im2col_step`, the number of images that mmcv processes at a time, is accepted and ignored: any batch size works.
- `groups` and `deform_groups` follow from the shapes of the tensors; a different value raises `ShapeError`.
- All other parameters and errors are those of `deform_conv2d`, `deform_roi_pool` and the layers of
  `dcnops.adapters.torch`.

Examples
--------
>>> import torch
>>> from dcnops.adapters.torch.mmcv_ops import ModulatedDeformConv2dPack, deform_conv2d
>>> image, weight = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3)
>>> deform_conv2d(image, torch.zeros(2, 18, 5, 5), weight, 1, 1, 1, 1, 1).shape
torch.Size([2, 8, 5, 5])
>>> list(ModulatedDeformConv2dPack(4, 8, 3, padding=1).state_dict())
['weight', 'bias', 'conv_offset.weight', 'conv_offset.bias']
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from dcnops._arguments import Pair
from dcnops._errors import ArgumentError, ShapeError

from . import deform_conv2d_layers, deform_roi_pool_layers, functional
from .deform_conv2d_layers import DeformConvBase, check_divisible
from .deform_roi_pool_layers import RoIPoolBase, ZeroLinear

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "deform_conv2d",
    "deform_roi_pool",
    "modulated_deform_conv2d",
]


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
    bias: bool = False,
    im2col_step: int = 32,
) -> Tensor:
    """Replace ``mmcv.ops.deform_conv2d`` (v1).

    Raises
    ------
    ArgumentError
        `bias` is True, or another parameter is invalid.
    """
    if bias:
        raise ArgumentError("bias must be False, as in mmcv; dcnops.adapters.torch.deform_conv2d takes a bias")
    _check_groups(input, offset, weight, groups, deform_groups)
    return functional.deform_conv2d(input, offset, weight, None, stride, padding, dilation)


def modulated_deform_conv2d(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Replace ``mmcv.ops.modulated_deform_conv2d`` (v2). The mask comes before the weight."""
    _check_groups(input, offset, weight, groups, deform_groups)
    return functional.deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    output_size: Pair,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
) -> Tensor:
    """Replace ``mmcv.ops.deform_roi_pool``. `sampling_ratio` is 0 by default."""
    return functional.deform_roi_pool(
        input,
        rois,
        offset,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )


class _ConvWithGivenOffsets(DeformConvBase):
    """Deformable convolution that knows its number of deformable groups and takes the offsets in `forward`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        check_divisible("in_channels", in_channels, "deform_groups", deform_groups)
        self.deform_groups = deform_groups

    def convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_groups(input, offset, self.weight, self.groups, self.deform_groups)
        return super().convolve(input, offset, mask)


class DeformConv2d(_ConvWithGivenOffsets):
    """Replacement for ``mmcv.ops.DeformConv2d`` (v1). Unlike mmcv, it accepts ``bias=True``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        _reset_kaiming(self)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve `x` [N, C, H, W], giving [N, O, oh, ow]."""
        return self.convolve(x, offset)


class ModulatedDeformConv2d(_ConvWithGivenOffsets):
    """Replacement for ``mmcv.ops.ModulatedDeformConv2d`` (v2)."""

    def reset_parameters(self) -> None:
        _reset_uniform(self)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve `x` [N, C, H, W], giving [N, O, oh, ow]."""
        return self.convolve(x, offset, mask)


class DeformConv2dPack(deform_conv2d_layers.DeformConv2dPack):
    """Replacement for ``mmcv.ops.DeformConv2dPack`` (v1). Unlike mmcv, it accepts ``bias=True``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        _reset_kaiming(self)


class ModulatedDeformConv2dPack(deform_conv2d_layers.ModulatedDeformConv2dPack):
    """Replacement for ``mmcv.ops.ModulatedDeformConv2dPack`` (v2), with the additional parameter `mask_scale`."""

    def reset_parameters(self) -> None:
        _reset_uniform(self)


class DeformRoIPool(deform_roi_pool_layers.DeformRoIPool):
    """Replacement for ``mmcv.ops.DeformRoIPool``. `sampling_ratio` is 0 by default."""

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)


class DeformRoIPoolPack(RoIPoolBase):
    """Replacement for ``mmcv.ops.DeformRoIPoolPack`` (v1).

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 2*P*Q features
        Three fully connected layers; the last one starts at zero.
    """

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)
        self.output_channels = output_channels
        self.deform_fc_channels = deform_fc_channels
        bins = math.prod(self.output_size)
        self.offset_fc = _linear_layers(output_channels * bins, deform_fc_channels, deform_fc_channels, 2 * bins)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q]."""
        features = self.pool(input, rois).flatten(1)
        return self.pool(input, rois, self.offset_fc(features).unflatten(1, (2, *self.output_size)))


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Replacement for ``mmcv.ops.ModulatedDeformRoIPoolPack`` (v2).

    Offsets and masks have separate branches, unlike `dcnops.adapters.torch.ModulatedDeformRoIPoolPack`, which has the
    single branch of the paper.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 2*P*Q features
        Three fully connected layers; the last one starts at zero.
    mask_fc : torch.nn.Sequential, C*P*Q to P*Q features
        Two fully connected layers; the last one starts at zero. A sigmoid turns their output into masks.
    """

    def __init__(
        self,
        output_size: Pair,
        output_channels: int,
        deform_fc_channels: int = 1024,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
    ) -> None:
        super().__init__(output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma)
        bins = math.prod(self.output_size)
        self.mask_fc = _linear_layers(output_channels * bins, deform_fc_channels, bins)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q]."""
        features = self.pool(input, rois).flatten(1)
        offset = self.offset_fc(features).unflatten(1, (2, *self.output_size))
        mask = torch.sigmoid(self.mask_fc(features)).unflatten(1, self.output_size)
        return self.pool(input, rois, offset, mask)


def _linear_layers(*widths: int) -> nn.Sequential:
    """Return fully connected layers with ReLU between them; the last one starts at zero."""
    layers: list[nn.Module] = []
    *hidden, (features, outputs) = pairwise(widths)
    for inputs, width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, ZeroLinear(features, outputs))


def _reset_kaiming(layer: DeformConvBase) -> None:
    """Draw the weight by Kaiming's rule for ReLU, and set the bias to 0."""
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _reset_uniform(layer: DeformConvBase) -> None:
    """Draw the weight uniformly from ±1/sqrt(C*kh*kw), regardless of groups, and set the bias to 0."""
    bound = 1 / math.sqrt(layer.in_channels * math.prod(layer.kernel_size))
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check_groups(input: Tensor, offset: Tensor, weight: Tensor, groups: int, deform_groups: int) -> None:
    """Check that the given groups are those implied by the shapes."""
    if not all(isinstance(given, Tensor) and given.ndim == 4 for given in (input, offset, weight)):
        return  # the operation reports wrong types and ranks, and accepts the proxies of torch.fx
    if input.shape[1] != weight.shape[1] * groups:
        raise ShapeError(
            f"input must be [N, C={groups * weight.shape[1]}, H, W] for groups={groups} "
            f"and weight {tuple(weight.shape)}, got shape {tuple(input.shape)}"
        )
    channels = 2 * deform_groups * weight.shape[2] * weight.shape[3]
    if offset.shape[1] != channels:
        raise ShapeError(
            f"offset must be [N, {channels}, oh, ow] for deform_groups={deform_groups} "
            f"and weight {tuple(weight.shape)}, got shape {tuple(offset.shape)}"
        )
