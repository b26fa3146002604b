"""The deformable functions and modules of ``mmcv.ops``, by its names and signatures.

``from dcnops.adapters.torch.mmcv_ops import DeformConv2dPack`` stands in for ``from mmcv.ops import DeformConv2dPack``:
same arguments and defaults, initialisation, order of offsets and checkpoint keys. `im2col_step`, the number of images
that mmcv processes at a time, is accepted and without effect, since here any batch is processed in pieces that fit.
`groups` and `deform_groups` of the functions follow from the shapes; they are compared with them.
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
from .deform_roi_pool_layers import LastLinear, RoIPoolBase

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
    """Deformable convolution (v1) with the signature of ``mmcv.ops.deform_conv2d``.

    Parameters
    ----------
    input : Tensor [N, C, H, W]
    offset : Tensor [N, 2*D*kh*kw, oh, ow], in pixels
    weight : Tensor [O, C/G, kh, kw]
    stride, padding, dilation : int or (vertical, horizontal)
    groups : int
        G, the number of weight groups.
    deform_groups : int
        D, the number of deformable groups.
    bias : bool
        Must be False.
    im2col_step : int
        Without effect: there is no limit to the batch.

    Returns
    -------
    Tensor [N, O, oh, ow]

    Raises
    ------
    ShapeError
        Also where `groups` or `deform_groups` is not that of the tensors.
    ArgumentError
        Also where `bias` is true.
    DtypeError, DeviceError
        As in `dcnops.adapters.torch.deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import deform_conv2d
    >>> image, weight = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3)
    >>> deform_conv2d(image, torch.zeros(2, 18, 5, 5), weight, 1, 1, 1, 1, 1).shape
    torch.Size([2, 8, 5, 5])
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
    """Modulated deformable convolution (v2) with the signature of ``mmcv.ops.modulated_deform_conv2d``.

    Parameters
    ----------
    input : Tensor [N, C, H, W]
    offset : Tensor [N, 2*D*kh*kw, oh, ow], in pixels
    mask : Tensor [N, D*kh*kw, oh, ow]
    weight : Tensor [O, C/G, kh, kw]
    bias : Tensor [O], optional
    stride, padding, dilation : int or (vertical, horizontal)
    groups : int
        G, the number of weight groups.
    deform_groups : int
        D, the number of deformable groups.

    Returns
    -------
    Tensor [N, O, oh, ow]

    Raises
    ------
    ShapeError
        Also where `groups` or `deform_groups` is not that of the tensors.
    ArgumentError, DtypeError, DeviceError
        As in `dcnops.adapters.torch.deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import modulated_deform_conv2d
    >>> image, weight = torch.randn(2, 4, 5, 5), torch.randn(8, 4, 3, 3)
    >>> modulated_deform_conv2d(image, torch.zeros(2, 18, 5, 5), torch.ones(2, 9, 5, 5), weight, None, 1, 1).shape
    torch.Size([2, 8, 5, 5])
    """
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
    """Deformable RoI pooling with the signature of ``mmcv.ops.deform_roi_pool``.

    Parameters
    ----------
    input : Tensor [N, C, H, W]
    rois : Tensor [R, 5]
        Regions (index of the feature map, x1, y1, x2, y2).
    offset : Tensor [R, 2, P, Q] or None
        Horizontal shifts first, as fractions of the region.
    output_size : int or (P, Q)
    spatial_scale : float
        Pixels of `input` per unit of `rois`.
    sampling_ratio : int
        Samples of a bin along each axis; 0 for as many as the bin has pixels.
    gamma : float
        Factor of the offsets.

    Returns
    -------
    Tensor [R, C, P, Q]

    Raises
    ------
    ShapeError, ArgumentError, DtypeError, DeviceError
        As in `dcnops.adapters.torch.deform_roi_pool`.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import deform_roi_pool
    >>> rois = torch.tensor([[0.0, 0, 0, 8, 8]])
    >>> deform_roi_pool(torch.randn(1, 4, 8, 8), rois, None, 7).shape
    torch.Size([1, 4, 7, 7])
    """
    return functional.deform_roi_pool(
        input,
        rois,
        offset,
        output_size=output_size,
        spatial_scale=spatial_scale,
        sampling_ratio=sampling_ratio,
        gamma=gamma,
    )


class _GivenOffsets(DeformConvBase):
    """A deformable convolution that is told its number of deformable groups, but not the offsets."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        deform_groups: int,
        bias: bool,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        check_divisible("in_channels", in_channels, "deform_groups", deform_groups)
        self.deform_groups = deform_groups

    def _convolve(self, x: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        _check_groups(x, offset, self.weight, self.groups, self.deform_groups)
        return functional.deform_conv2d(
            x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask
        )


class DeformConv2d(_GivenOffsets):
    """Deformable convolution (v1) with the constructor of ``mmcv.ops.DeformConv2d``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        As in `dcnops.adapters.torch.DeformConv2d`.
    deform_groups : int
        D, the number of deformable groups; divides `in_channels`.
    bias : bool
        Whether there is a bias; mmcv refuses one.
    im2col_step : int
        Without effect: there is no limit to the batch.

    Raises
    ------
    ArgumentError
        A parameter is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import DeformConv2d
    >>> layer = DeformConv2d(4, 8, 3, padding=1, deform_groups=2)
    >>> layer(torch.randn(2, 4, 5, 5), torch.zeros(2, 36, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
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
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew, by Kaiming's rule for ReLU."""
        _reset_kaiming(self)

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        """Convolve `x` [N, C, H, W] with `offset` [N, 2*D*kh*kw, oh, ow], giving [N, O, oh, ow].

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            As in `deform_conv2d`.
        """
        return self._convolve(x, offset, None)


class ModulatedDeformConv2d(_GivenOffsets):
    """Modulated deformable convolution (v2) with the constructor of ``mmcv.ops.ModulatedDeformConv2d``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in `dcnops.adapters.torch.DeformConv2d`.
    deform_groups : int
        D, the number of deformable groups; divides `in_channels`.

    Raises
    ------
    ArgumentError
        A parameter is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import ModulatedDeformConv2d
    >>> layer = ModulatedDeformConv2d(4, 8, 3, padding=1)
    >>> layer(torch.randn(2, 4, 5, 5), torch.zeros(2, 18, 5, 5), torch.ones(2, 9, 5, 5)).shape
    torch.Size([2, 8, 5, 5])
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
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew, uniformly in ±1/sqrt(C*kh*kw); the bias is 0."""
        _reset_uniform(self)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve `x` with `offset` [N, 2*D*kh*kw, oh, ow] and `mask` [N, D*kh*kw, oh, ow], giving [N, O, oh, ow].

        Raises
        ------
        ShapeError, DtypeError, DeviceError
            As in `modulated_deform_conv2d`.
        """
        return self._convolve(x, offset, mask)


class DeformConv2dPack(deform_conv2d_layers.DeformConv2dPack):
    """`dcnops.adapters.torch.DeformConv2dPack` with the constructor of ``mmcv.ops.DeformConv2dPack``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups
        As there.
    bias : bool
        Whether the convolution has a bias; mmcv refuses one.
    im2col_step : int
        Without effect: there is no limit to the batch.

    Raises
    ------
    ArgumentError
        A parameter is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import DeformConv2dPack
    >>> list(DeformConv2dPack(4, 8, 3, padding=1).state_dict())
    ['weight', 'conv_offset.weight', 'conv_offset.bias']
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
        bias: bool = False,
        im2col_step: int = 32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias)

    def reset_parameters(self) -> None:
        """Draw the weight anew, by Kaiming's rule for ReLU."""
        _reset_kaiming(self)


class ModulatedDeformConv2dPack(deform_conv2d_layers.ModulatedDeformConv2dPack):
    """`dcnops.adapters.torch.ModulatedDeformConv2dPack` with the initialisation of mmcv's.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias, mask_scale
        As there.

    Raises
    ------
    ArgumentError
        A parameter is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import ModulatedDeformConv2dPack
    >>> list(ModulatedDeformConv2dPack(4, 8, 3, padding=1).state_dict())
    ['weight', 'bias', 'conv_offset.weight', 'conv_offset.bias']
    """

    def reset_parameters(self) -> None:
        """Draw the weight anew, uniformly in ±1/sqrt(C*kh*kw); the bias is 0."""
        _reset_uniform(self)


class DeformRoIPool(deform_roi_pool_layers.DeformRoIPool):
    """`dcnops.adapters.torch.DeformRoIPool` with mmcv's default of `sampling_ratio`.

    Parameters
    ----------
    output_size, spatial_scale, sampling_ratio, gamma
        As there.

    Raises
    ------
    ArgumentError
        `output_size` is not legal.

    Examples
    --------
    >>> from dcnops.adapters.torch.mmcv_ops import DeformRoIPool
    >>> DeformRoIPool((7, 7), spatial_scale=0.25)
    DeformRoIPool(output_size=(7, 7), spatial_scale=0.25, sampling_ratio=0, gamma=0.1)
    """

    def __init__(
        self, output_size: Pair, spatial_scale: float = 1.0, sampling_ratio: int = 0, gamma: float = 0.1
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, gamma)


class DeformRoIPoolPack(RoIPoolBase):
    """Deformable RoI pooling (v1) with the constructor and the branch of ``mmcv.ops.DeformRoIPoolPack``.

    Parameters
    ----------
    output_size : int or (P, Q)
    output_channels : int
        C, the channels of the feature map.
    deform_fc_channels : int
        Width of the two hidden layers.
    spatial_scale, sampling_ratio, gamma
        As in `deform_roi_pool`.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 2*P*Q features
        Three fully connected layers, the last zero at the start.

    Raises
    ------
    ArgumentError
        `output_size` is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import DeformRoIPoolPack
    >>> pool = DeformRoIPoolPack(7, 4, 64)
    >>> pool(torch.randn(1, 4, 16, 16), torch.tensor([[0.0, 0, 0, 8, 8]])).shape
    torch.Size([1, 4, 7, 7])
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
        self.offset_fc = _branch(output_channels * bins, deform_fc_channels, deform_fc_channels, 2 * bins)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q].

        Raises
        ------
        ShapeError, ArgumentError, DtypeError, DeviceError
            As in `deform_roi_pool`.
        """
        features = self.pool(input, rois).flatten(1)
        return self.pool(input, rois, self.offset_fc(features).unflatten(1, (2, *self.output_size)))


class ModulatedDeformRoIPoolPack(DeformRoIPoolPack):
    """Modulated deformable RoI pooling (v2) with the branches of ``mmcv.ops.ModulatedDeformRoIPoolPack``.

    Unlike `dcnops.adapters.torch.ModulatedDeformRoIPoolPack`, which has the paper's single branch.

    Parameters
    ----------
    output_size, output_channels, deform_fc_channels, spatial_scale, sampling_ratio, gamma
        As in `DeformRoIPoolPack`.

    Attributes
    ----------
    offset_fc : torch.nn.Sequential, C*P*Q to 2*P*Q features
        Three fully connected layers, the last zero at the start.
    mask_fc : torch.nn.Sequential, C*P*Q to P*Q features
        Two fully connected layers, the last zero at the start; a sigmoid makes masks of the logits.

    Raises
    ------
    ArgumentError
        `output_size` is not legal.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch.mmcv_ops import ModulatedDeformRoIPoolPack
    >>> pool = ModulatedDeformRoIPoolPack(7, 4, 64)
    >>> pool(torch.randn(1, 4, 16, 16), torch.tensor([[0.0, 0, 0, 8, 8]])).shape
    torch.Size([1, 4, 7, 7])
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
        self.mask_fc = _branch(output_channels * bins, deform_fc_channels, bins)

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, C, P, Q].

        Raises
        ------
        ShapeError, ArgumentError, DtypeError, DeviceError
            As in `deform_roi_pool`.
        """
        features = self.pool(input, rois).flatten(1)
        offset = self.offset_fc(features).unflatten(1, (2, *self.output_size))
        mask = torch.sigmoid(self.mask_fc(features)).unflatten(1, self.output_size)
        return self.pool(input, rois, offset, mask)


def _branch(*widths: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them, the last zero."""
    layers: list[nn.Module] = []
    *hidden, (features, outputs) = pairwise(widths)
    for before, after in hidden:
        layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, LastLinear(features, outputs))


def _reset_kaiming(layer: DeformConvBase) -> None:
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _reset_uniform(layer: DeformConvBase) -> None:
    bound = 1 / math.sqrt(layer.in_channels * math.prod(layer.kernel_size))
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _check_groups(input: Tensor, offset: Tensor, weight: Tensor, groups: int, deform_groups: int) -> None:
    """Whether groups that the caller states are those that the shapes imply."""
    if not all(isinstance(given, Tensor) and given.ndim == 4 for given in (input, offset, weight)):
        return  # an error of the operation, which says it better, or what torch.fx puts in the place of tensors
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
