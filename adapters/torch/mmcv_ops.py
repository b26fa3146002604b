"""The deformable functions and modules of ``mmcv.ops``, by its names and signatures.

``from dcnops.adapters.torch.mmcv_ops import DeformConv2dPack`` stands in for ``from mmcv.ops import DeformConv2dPack``:
same arguments and defaults, initialisation, order of offsets and checkpoint keys. `im2col_step`, the number of images
that mmcv processes at a time, is accepted and without effect, since here any batch is processed in pieces that fit.
`groups` and `deform_groups` of the functions follow from the shapes; they are compared with them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dcnops._errors import ArgumentError, ShapeError
from dcnops._geometry import Pair

from . import conv_modules, functional, roi_modules

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


class DeformConv2d(conv_modules.DeformConv2d):
    """``mmcv.ops.DeformConv2d``: deformable convolution (v1) with offsets given to `forward`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias
        As in `dcnops.adapters.torch.DeformConv2d`. The bias is off by default; mmcv has none.
    deform_groups : int
        D, the number of deformable groups that offsets must have; divides `in_channels`.
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
    ...
