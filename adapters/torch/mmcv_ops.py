"""Replacements for the deformable functions and layers of ``mmcv.ops``, under the same names.

Write ``from dcnops.adapters.torch.mmcv_ops import DeformConv2dPack`` instead of ``from mmcv.ops import
DeformConv2dPack``, or call `install` to use them in mmdetection. Arguments, defaults, initial weights, the order of
offset channels and checkpoint keys are those of mmcv. Common differences:

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

import functools
import math
import warnings
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dcnops._arguments import Pair, expand_padding, expand_pair
from dcnops._errors import ArgumentError, ShapeError
from dcnops._shapes import output_extent

from . import deform_conv2d_layers, deform_roi_pool_layers, functional
from .deform_conv2d_layers import DeformConvBase, check_divisible
from .deform_roi_pool_layers import RoIPoolBase
from .mmcv_attention import (
    MultiScaleDeformableAttention,
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from .mmcv_install import install_into_mmcv
from .zero_layers import OffsetProjection, ZeroLayer

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformRoIPool",
    "DeformRoIPoolPack",
    "ModulatedDeformConv2d",
    "ModulatedDeformConv2dPack",
    "ModulatedDeformRoIPoolPack",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "deform_conv2d",
    "deform_roi_pool",
    "install",
    "modulated_deform_conv2d",
    "multi_scale_deformable_attn_pytorch",
]


def install(*, allow_larger_offsets: bool = False) -> None:
    """Put the functions and layers of this module into mmcv, so that mmdetection and others use them unchanged.

    Call it once, before mmdetection is imported. It works with mmcv 2 and mmcv-lite 2, also if mmcv's compiled
    operations are missing or cannot be loaded. In that case a stand-in takes their place. Of the other operations, it
    has `nms`, `batched_nms`, `roi_align` and `roi_pool` by means of torchvision, and `sigmoid_focal_loss` in PyTorch.
    The rest raises `NotImplementedError` when it is called.

    Parameters
    ----------
    allow_larger_offsets : bool
        Default of `modulated_deform_conv2d` and `ModulatedDeformConv2d`; True for DyHead.

    Raises
    ------
    ImportError
        mmcv or mmengine is not installed; or mmcv has no compiled operations, and torchvision is not installed.

    Examples
    --------
    ::

        from dcnops.adapters.torch import mmcv_ops

        mmcv_ops.install()
        import mmdet.models
    """
    replacements = {name: globals()[name] for name in __all__ if name != "install"}
    if allow_larger_offsets:
        replacements["modulated_deform_conv2d"] = functools.partial(modulated_deform_conv2d, allow_larger_offsets=True)
    layers = {
        "DCN": DeformConv2dPack,
        "DCNv2": ModulatedDeformConv2dPack,
        "MultiScaleDeformableAttention": MultiScaleDeformableAttention,
    }
    install_into_mmcv(replacements, layers)
    ModulatedDeformConv2d.allow_larger_offsets = allow_larger_offsets


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
    *,
    allow_larger_offsets: bool = False,
    precision: str | None = None,
) -> Tensor:
    """Replace ``mmcv.ops.modulated_deform_conv2d`` (v2). The mask comes before the weight.

    Parameters
    ----------
    allow_larger_offsets : bool
        Accept an `offset` and a `mask` of more rows and columns than the output, and use the first values of each
        image in memory order, as mmcv and the DCNv2 extension do without a word. The values then do not belong to the
        pixels that they were predicted for. Networks that were trained this way need it: DyHead and DBNet, where
        offsets and masks have twice the output's size.
    precision : "ieee", "tf32" or "3xtf32", optional
        See `dcnops.adapters.torch.deform_conv2d`.

    Raises
    ------
    ShapeError
        `offset` or `mask` does not have the size of the output, or with `allow_larger_offsets` has fewer values.
    """
    _check_groups(input, offset, weight, groups, deform_groups)
    numbers = (stride, padding, dilation)
    if allow_larger_offsets:
        offset, mask = _leading_values((offset, mask), _output_size(input, weight, *numbers))
    try:
        return functional.deform_conv2d(input, offset, weight, bias, *numbers, mask, precision=precision)
    except ShapeError as error:
        if all(isinstance(given, Tensor) and given.ndim == 4 for given in (input, offset, weight, mask)):
            size = _output_size(input, weight, *numbers)
            if all(tensor.shape[2:] == size for tensor in _leading_values((offset, mask), size)):
                hint = "with allow_larger_offsets=True, the first values of each image are used, as in mmcv"
                raise ShapeError(f"{error}; {hint}") from None
        raise


def _output_size(input: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, ...]:
    """Return the height and width of a convolution's output."""
    strides, dilations = expand_pair("stride", stride), expand_pair("dilation", dilation)
    axes = zip(("height", "width"), input.shape[2:], expand_padding(padding), weight.shape[2:], strides, dilations)
    return tuple(output_extent(axis, size, sum(sides), *numbers) for axis, size, sides, *numbers in axes)


def _leading_values(tensors: tuple[Tensor, Tensor], size: tuple[int, ...]) -> list[Tensor]:
    """Return the first values of each image of tensors [N, channels, ...] as [N, channels, *size].

    A tensor with too few values stays as it is.
    """
    return [
        tensor
        if tensor.shape[2:] == size or math.prod(tensor.shape[2:]) < math.prod(size)
        else tensor.flatten(1)[:, : tensor.shape[1] * math.prod(size)].unflatten(1, (-1, *size))
        for tensor in tensors
    ]


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


class _MmcvArgumentError(ArgumentError, AssertionError):
    """An argument is invalid, and mmcv raises an `AssertionError` for it."""


class _MmcvConv(DeformConvBase):
    """Deformable convolution that knows its number of deformable groups.

    `options` are `precision`, `device` and `dtype`, as in `dcnops.adapters.torch.DeformConv2d`.
    """

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
        **options: Any,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups)
        try:
            super().__init__(in_channels, out_channels, *geometry, bias=bias, **options)
            check_divisible("in_channels", in_channels, "deform_groups", deform_groups)
        except ArgumentError as error:
            raise _MmcvArgumentError(str(error)) from error
        self.deform_groups = deform_groups

    def convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_groups(input, offset, self.weight, self.groups, self.deform_groups)
        return super().convolve(input, offset, mask)


class DeformConv2d(_MmcvConv):
    """Replacement for ``mmcv.ops.DeformConv2d`` (v1). Like that layer, it has no bias and no attribute `bias`."""

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
        *,
        deformable_groups: int | None = None,
        **options: Any,
    ) -> None:
        if bias:
            layer = f"dcnops.adapters.torch.{type(self).__name__}"
            raise _MmcvArgumentError(f"bias must be False, as in mmcv, got {bias}; {layer} has a bias")
        deform_groups = _deform_groups(deform_groups, deformable_groups)
        geometry = (kernel_size, stride, padding, dilation, groups, deform_groups)
        super().__init__(in_channels, out_channels, *geometry, bias=False, **options)
        del self.bias

    def reset_parameters(self) -> None:
        """Draw the weight by Kaiming's rule for ReLU."""
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve `x` [N, C, H, W], giving [N, O, oh, ow]."""
        return self.convolve(x, offset)


class ModulatedDeformConv2d(_MmcvConv):
    """Replacement for ``mmcv.ops.ModulatedDeformConv2d`` (v2).

    Attributes
    ----------
    allow_larger_offsets : bool
        See `modulated_deform_conv2d`. It can also be set on the layers of a finished network.
    """

    allow_larger_offsets = False

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
        *,
        deformable_groups: int | None = None,
        allow_larger_offsets: bool = False,
        **options: Any,
    ) -> None:
        deform_groups = _deform_groups(deform_groups, deformable_groups)
        geometry = (kernel_size, stride, padding, dilation, groups, deform_groups)
        super().__init__(in_channels, out_channels, *geometry, bias=bias, **options)
        if allow_larger_offsets:
            self.allow_larger_offsets = True

    def reset_parameters(self) -> None:
        """Draw the weight uniformly from ±1/sqrt(C*kh*kw), regardless of groups, and set the bias to 0."""
        bound = 1 / math.sqrt(self.in_channels * math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def init_weights(self) -> None:
        """Initialise all parameters again, including those of a branch. mmengine calls this method."""
        self.reset_parameters()

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve `x` [N, C, H, W], giving [N, O, oh, ow]."""
        parameters = (self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups, self.deform_groups)
        options: dict[str, Any] = {"allow_larger_offsets": self.allow_larger_offsets, "precision": self.precision}
        output: Tensor = modulated_deform_conv2d(x, offset, mask, *parameters, **options)
        return output


class _PlainConvolution(nn.Conv2d):
    """Class between `OffsetBranch` and `torch.nn.Conv2d`: mmengine initialises layers by the names of their bases."""


class OffsetBranch(ZeroLayer, _PlainConvolution):
    """Branch as mmengine's optimisers need it for ``dcn_offset_lr_mult``: a `torch.nn.Conv2d`."""


class DeformConv2dPack(deform_conv2d_layers.DeformConv2dPack, DeformConv2d):  # type: ignore[misc]
    """Replacement for ``mmcv.ops.DeformConv2dPack`` (v1). Like that layer, it has no bias and no attribute `bias`."""

    branch_type = OffsetBranch

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
        *,
        deformable_groups: int | None = None,
        **options: Any,
    ) -> None:
        deform_groups = _deform_groups(deform_groups, deformable_groups)
        numbers = (stride, padding, dilation, groups, deform_groups, bias)
        super().__init__(in_channels, out_channels, kernel_size, *numbers, **options)


class ModulatedDeformConv2dPack(  # type: ignore[misc]
    deform_conv2d_layers.ModulatedDeformConv2dPack, ModulatedDeformConv2d
):
    """Replacement for ``mmcv.ops.ModulatedDeformConv2dPack`` (v2), with the additional parameter `mask_scale`."""

    branch_type = OffsetBranch

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
        *,
        mask_scale: float = 1.0,
        deformable_groups: int | None = None,
        **options: Any,
    ) -> None:
        deform_groups = _deform_groups(deform_groups, deformable_groups)
        numbers = (stride, padding, dilation, groups, deform_groups, bias)
        super().__init__(in_channels, out_channels, kernel_size, *numbers, mask_scale=mask_scale, **options)


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
    return nn.Sequential(*layers, OffsetProjection(features, outputs))


def _deform_groups(deform_groups: int, deformable_groups: int | None) -> int:
    """Return the number of deformable groups, which has an old name, with a warning if that is used."""
    if deformable_groups is None:
        return deform_groups
    warnings.warn("deformable_groups is the old name of deform_groups", DeprecationWarning, stacklevel=3)
    if deform_groups != 1:
        raise ArgumentError(
            f"deform_groups must not be given together with its old name deformable_groups, "
            f"got {deform_groups} and {deformable_groups}"
        )
    return deformable_groups


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
