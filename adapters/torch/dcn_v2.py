"""Replacements for the DCNv2 extension, the module ``dcn_v2`` of CenterNet, FairMOT, YOLACT++, CenterTrack and others.

Write ``from dcnops.adapters.torch.dcn_v2 import DCN`` instead of ``from dcn_v2 import DCN``. To leave the import as it
is, set ``sys.modules["dcn_v2"]`` to this module. Arguments, defaults, initial weights, the order of channels,
checkpoint keys and results are those of the extension. Errors and data types are those of `deform_conv2d`.

Examples
--------
>>> import torch
>>> from dcnops.adapters.torch.dcn_v2 import DCN, DCNPooling
>>> image = torch.randn(2, 4, 16, 16)
>>> layer = DCN(4, 8, kernel_size=3, stride=1, padding=1, deformable_groups=2)
>>> layer(image).shape
torch.Size([2, 8, 16, 16])
>>> list(layer.state_dict())
['weight', 'bias', 'conv_offset_mask.weight', 'conv_offset_mask.bias']
>>> pool = DCNPooling(spatial_scale=1 / 4, pooled_size=7, output_dim=4, no_trans=False, trans_std=0.1)
>>> pool(image, torch.tensor([[1, 8.0, 8.0, 48.0, 40.0]])).shape
torch.Size([1, 4, 7, 7])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcnops._arguments import Pair
from dcnops._errors import ArgumentError, DtypeError, ShapeError

from .deform_conv2d_layers import OffsetBranch, check_input
from .functional import is_tensor_proxy, type_name
from .mmcv_ops import ModulatedDeformConv2d, modulated_deform_conv2d
from .zero_layers import OffsetProjection

__all__ = ["DCN", "DCNPooling", "DCNv2", "DCNv2Pooling", "dcn_v2_conv", "dcn_v2_pooling"]


def dcn_v2_conv(
    input: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    deformable_groups: int,
    *,
    allow_larger_offsets: bool = False,
) -> Tensor:
    """Compute a modulated deformable convolution.

    The extension does not check the sizes of `offset` and `mask`. For `allow_larger_offsets`, see
    `mmcv_ops.modulated_deform_conv2d`.
    """
    numbers = (stride, padding, dilation, 1, deformable_groups)
    return modulated_deform_conv2d(
        input, offset, mask, weight, bias, *numbers, allow_larger_offsets=allow_larger_offsets
    )


class DCNv2(ModulatedDeformConv2d):
    """Modulated deformable convolution layer that takes offsets and masks in `forward`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair = 1,
        deformable_groups: int = 1,
    ) -> None:
        numbers = (stride, padding, dilation, 1, deformable_groups)
        super().__init__(in_channels, out_channels, kernel_size, *numbers)
        self.deformable_groups = deformable_groups


class DCN(DCNv2):
    """Modulated deformable convolution layer that predicts its offsets and masks.

    Attributes
    ----------
    conv_offset_mask : Module
        The branch, which starts at zero. As in the extension, it has no dilation: in a layer with dilation, its output
        is larger than the layer's, and the first values of each image are used.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair = 1,
        deformable_groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, deformable_groups)
        channels = 3 * deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        self.conv_offset_mask = OffsetBranch(in_channels, channels, self.kernel_size, self.stride, self.padding)

    def init_offset(self) -> None:
        """Set the branch to zero."""
        self.conv_offset_mask.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters again, including those of the branch."""
        super().reset_parameters()
        if hasattr(self, "conv_offset_mask"):  # not yet, when the constructor of the base class calls this method
            self.init_offset()

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Convolve `input` [N, C, H, W], giving [N, O, oh, ow]."""
        if not is_tensor_proxy(input):
            check_input(input, self.in_channels)
        points = self.deformable_groups * self.kernel_size[0] * self.kernel_size[1]
        offset, logits = self.conv_offset_mask(input).split((2 * points, points), dim=1)
        return dcn_v2_conv(
            input,
            offset,
            torch.sigmoid(logits),
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.deformable_groups,
            allow_larger_offsets=self.dilation != (1, 1),
        )


def dcn_v2_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    spatial_scale: float,
    pooled_size: int,
    output_dim: int,
    no_trans: bool,
    group_size: int = 1,
    part_size: int | None = None,
    sample_per_part: int = 4,
    trans_std: float = 0.0,
) -> Tensor:
    """Compute deformable position-sensitive RoI pooling.

    It differs from `deform_roi_pool`. Regions are rounded to whole pixels of the image and include their last pixel,
    samples lie at the corners of their cells, those outside the feature map do not count in the mean of a bin, and the
    output channels can have different offsets.

    Parameters
    ----------
    input : Tensor [N, output_dim * group_size**2, H, W]
    rois : Tensor [R, 5]
        Regions (index of the feature map, x1, y1, x2, y2). They have no gradient.
    offset : Tensor [R, 2*K, part_size, part_size]
        Shifts as a fraction of the region: for each of K classes, horizontal, then vertical. Each class has
        output_dim/K channels. Ignored if `no_trans`.
    spatial_scale : float
        Pixels of `input` per unit of `rois`.
    pooled_size : int
        P, the number of bins along each axis.
    output_dim : int
        Number of output channels.
    no_trans : bool
        Pool without offsets.
    group_size : int
        Cells of a region along each axis that have input channels of their own. The extension accepts only 1.
    part_size : int, optional
        Size of `offset`; P by default.
    sample_per_part : int
        Samples of a bin along each axis.
    trans_std : float
        Factor of the offsets.

    Returns
    -------
    Tensor [R, output_dim, P, P]

    Raises
    ------
    ShapeError
        A tensor has the wrong rank or size.
    ArgumentError
        A size is below 1; or, on a CPU, `rois` refer to a feature map that `input` does not have. On a GPU, the bins of
        such a region are NaN.
    DtypeError
        An argument is not a tensor of floating-point numbers.
    """
    part_size = pooled_size if part_size is None else part_size
    classes = _check_pooling(
        input, rois, offset, pooled_size, output_dim, no_trans, group_size, part_size, sample_per_part
    )
    dtype = torch.promote_types(input.dtype, torch.float32)
    N, _, H, W = input.shape
    R, P = len(rois), pooled_size
    images, regions = rois[:, 0], _round_half_away(rois[:, 1:].detach().to(dtype))
    start, end = regions[:, :2] * spatial_scale - 0.5, (regions[:, 2:] + 1) * spatial_scale - 0.5
    extent = (end - start).clamp(min=0.1)
    bins = torch.arange(P, dtype=dtype, device=input.device)
    parts = (bins / P * part_size).floor().long()
    groups = (bins * group_size / P).floor().long().clamp(0, group_size - 1)

    if no_trans:
        shift = extent.new_zeros(R, 1, 2, P, P)
    else:
        shift = offset.to(dtype).unflatten(1, (classes, 2))[..., parts[:, None], parts] * trans_std
    columns, x_weights = _samples(bins, start[:, 0], extent[:, 0], shift[:, :, 0], sample_per_part, W)
    rows, y_weights = _samples(bins[:, None], start[:, 1], extent[:, 1], shift[:, :, 1], sample_per_part, H)

    # Each bin is a weighted sum of pixels: a bag of rows of a table of all pixels.
    known = (images > -1) & (images < N)
    if input.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(known.all()):
        raise ArgumentError(
            f"rois must hold indices of feature maps from 0 to N-1={N - 1} in column 0, got {images.tolist()}"
        )
    maps = torch.where(known, images, 0).long()[:, None, None] * group_size + groups[:, None]
    maps = (maps * group_size + groups)[:, None, :, :, None, None]
    pixels = (maps * H + rows[..., :, None]) * W + columns[..., None, :]
    weights = y_weights[..., :, None] * x_weights[..., None, :]
    count = (y_weights.sum(-1) * x_weights.sum(-1)).detach().round()
    weights = weights / count.clamp(min=1)[..., None, None]
    table = input.to(dtype).unflatten(1, (output_dim, group_size, group_size)).permute(0, 2, 3, 4, 5, 1)
    pooled = [
        functional.embedding_bag(
            pixels[:, k].flatten(3).flatten(0, 2),
            channels.reshape(-1, channels.shape[-1]),
            mode="sum",
            per_sample_weights=weights[:, k].flatten(3).flatten(0, 2),
        ).unflatten(0, (R, P, P))
        for k, channels in enumerate(table.chunk(classes, dim=-1))
    ]
    output = torch.cat(pooled, dim=-1).movedim(-1, 1).contiguous()
    return output.masked_fill(~known[:, None, None, None], torch.nan).to(input.dtype)


class DCNv2Pooling(nn.Module):
    """Position-sensitive RoI pooling layer that takes the offsets in `forward`. See `dcn_v2_pooling`."""

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.spatial_scale = spatial_scale
        self.pooled_size = pooled_size
        self.output_dim = output_dim
        self.no_trans = no_trans
        self.group_size = group_size
        self.part_size = pooled_size if part_size is None else part_size
        self.sample_per_part = sample_per_part
        self.trans_std = trans_std

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor) -> Tensor:
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, output_dim, P, P]."""
        return self.pool(input, rois, offset, self.no_trans)

    def pool(self, input: Tensor, rois: Tensor, offset: Tensor, no_trans: bool) -> Tensor:
        return dcn_v2_pooling(
            input,
            rois,
            offset,
            self.spatial_scale,
            self.pooled_size,
            self.output_dim,
            no_trans,
            self.group_size,
            self.part_size,
            self.sample_per_part,
            self.trans_std,
        )


class DCNPooling(DCNv2Pooling):
    """Position-sensitive RoI pooling layer that predicts offsets and masks, unless `no_trans`.

    Attributes
    ----------
    offset_mask_fc : torch.nn.Sequential, output_dim*P*P to 3*P*P features
        Three fully connected layers; the last one starts at zero. Only without `no_trans`.
    """

    def __init__(
        self,
        spatial_scale: float,
        pooled_size: int,
        output_dim: int,
        no_trans: bool,
        group_size: int = 1,
        part_size: int | None = None,
        sample_per_part: int = 4,
        trans_std: float = 0.0,
        deform_fc_dim: int = 1024,
    ) -> None:
        numbers = (group_size, part_size, sample_per_part, trans_std)
        super().__init__(spatial_scale, pooled_size, output_dim, no_trans, *numbers)
        self.deform_fc_dim = deform_fc_dim
        if not no_trans:
            bins = pooled_size * pooled_size
            self.offset_mask_fc = nn.Sequential(
                nn.Linear(bins * output_dim, deform_fc_dim),
                nn.ReLU(inplace=True),
                nn.Linear(deform_fc_dim, deform_fc_dim),
                nn.ReLU(inplace=True),
                OffsetProjection(deform_fc_dim, 3 * bins),
            )

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:  # type: ignore[override]
        """Pool `rois` [R, 5] from `input` [N, C, H, W], giving [R, output_dim, P, P]."""
        features = self.pool(input, rois, input.new_empty(0), no_trans=True)
        if self.no_trans:
            return features
        values = self.offset_mask_fc(features.flatten(1)).unflatten(1, (3, self.pooled_size, self.pooled_size))
        return self.pool(input, rois, values[:, :2], no_trans=False) * torch.sigmoid(values[:, 2:])


def _round_half_away(values: Tensor) -> Tensor:
    """Round as C does, halves away from zero; `torch.round` rounds them to even numbers."""
    whole = values.trunc()
    return whole + ((values - whole).abs() >= 0.5) * values.sign()


def _samples(
    bins: Tensor, start: Tensor, extent: Tensor, shift: Tensor, samples: int, size: int
) -> tuple[Tensor, Tensor]:
    """Return the two neighbours of each sample along one axis of the map, and their bilinear weights.

    Both are [R, K, P, P, 2 * samples]. Samples outside the map have the weight zero.
    """
    start, extent = start[:, None, None, None], extent[:, None, None, None]
    side = extent / shift.shape[-1]
    first = bins * side + start + shift * extent
    position = first[..., None] + torch.arange(samples, device=bins.device) * (side / samples)[..., None]
    inside = (position >= -0.5) & (position <= size - 0.5)
    position = torch.where(inside, position, 0).clamp(0, size - 1)
    low, high = position.floor().detach(), position.ceil().detach()
    fraction = position - low
    weights = torch.stack((1 - fraction, fraction), dim=-1) * inside[..., None]
    return torch.stack((low, high), dim=-1).long().flatten(-2), weights.flatten(-2)


def _check_pooling(
    input: Tensor,
    rois: Tensor,
    offset: Tensor,
    pooled_size: int,
    output_dim: int,
    no_trans: bool,
    group_size: int,
    part_size: int,
    sample_per_part: int,
) -> int:
    """Check the arguments of `dcn_v2_pooling`, and return the number of classes."""
    for name, tensor in {"input": input, "rois": rois, **({} if no_trans else {"offset": offset})}.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type_name(tensor)
            raise DtypeError(f"{name} must be a floating-point torch.Tensor, got {got}")
    sizes = {"pooled_size": pooled_size, "output_dim": output_dim, "group_size": group_size}
    for name, size in {**sizes, "part_size": part_size, "sample_per_part": sample_per_part}.items():
        if size < 1:
            raise ArgumentError(f"{name} must be at least 1, got {size}")
    channels = output_dim * group_size**2
    if input.ndim != 4 or input.shape[1] != channels or min(input.shape[1:]) < 1:
        raise ShapeError(
            f"input must be [N, output_dim*group_size**2={channels}, H >= 1, W >= 1], got shape {tuple(input.shape)}"
        )
    if rois.ndim != 2 or rois.shape[1] != 5:
        raise ShapeError(f"rois must be [R, 5] (image, x1, y1, x2, y2), got shape {tuple(rois.shape)}")
    if no_trans:
        return 1
    classes = offset.shape[1] // 2 if offset.ndim == 4 else 0
    if not classes or output_dim % classes or offset.shape != (len(rois), 2 * classes, part_size, part_size):
        raise ShapeError(
            f"offset must be [R={len(rois)}, 2*K, part_size={part_size}, part_size={part_size}] "
            f"with K a divisor of output_dim={output_dim}, got shape {tuple(offset.shape)}"
        )
    return classes
