"""Deformable convolution layers: with given offsets, and with a branch that predicts them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcnops._arguments import Pair, as_integer, check_precision, expand_pair
from dcnops._errors import ArgumentError, DtypeError, ShapeError
from dcnops._shapes import output_extent

from .devices import is_autocast_enabled
from .functional import deform_conv2d, is_tensor_proxy, named_padding, type_name
from .zero_layers import Device, ZeroLayer


class DeformConvBase(nn.Module):
    """Parameters that every deformable convolution has, created and initialised like those of `torch.nn.Conv2d`."""

    weight: Tensor
    bias: Tensor | None
    precision: str | None = None  # of modules that were pickled without it
    # Attributes of `torch.nn.Conv2d` that containers of convolutions read, such as mmcv's ConvModule.
    transposed = False
    output_padding = (0, 0)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        precision: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_precision(precision)
        self.precision = precision
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            check_divisible(name, channels, "groups", groups)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = expand_pair("kernel_size", kernel_size)
        self.stride = expand_pair("stride", stride)
        self.dilation = expand_pair("dilation", dilation)
        self.padding = symmetric_padding(padding, self.kernel_size, self.stride, self.dilation)
        self.groups = groups
        shape = out_channels, in_channels // groups, *self.kernel_size
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from ±1/sqrt(fan_in)."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def convolve(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = getattr(self, "bias", None)  # the layers of mmcv have no attribute
        geometry = self.stride, self.padding, self.dilation
        return deform_conv2d(input, offset, self.weight, bias, *geometry, mask, precision=self.precision)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)}"
        text = f"{text}, bias=False" if getattr(self, "bias", None) is None else text
        return text if self.precision is None else f"{text}, precision={self.precision!r}"


class DeformConv2d(DeformConvBase):
    """Deformable convolution layer that takes the offsets, and optionally masks, as arguments of `forward`.

    See `deform_conv2d` for the operation. Constructor, initialisation and state dict are those of
    ``torchvision.ops.DeformConv2d``.

    Parameters
    ----------
    in_channels, out_channels : int
        C and O.
    kernel_size, stride, dilation : int or (vertical, horizontal)
    padding : int, (vertical, horizontal), "same" or "valid"
        In pixels, or by name as in `torch.nn.Conv2d`.
    groups : int
        G, the number of weight groups; divides C and O.
    bias : bool
        Add a bias.
    precision : "ieee", "tf32" or "3xtf32", optional
        Arithmetic of float32 products on a GPU, see `deform_conv2d`.
    device, dtype : optional
        Of the parameters, as in `torch.nn.Conv2d`.

    Attributes
    ----------
    weight : Parameter [O, C/G, kh, kw]
    bias : Parameter [O] or None

    Raises
    ------
    ArgumentError
        A parameter is out of range.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2d
    >>> layer = DeformConv2d(4, 8, kernel_size=3, padding=1)
    >>> offset = torch.zeros(2, 2 * 3 * 3, 5, 6)  # one deformable group
    >>> layer(torch.randn(2, 4, 5, 6), offset).shape
    torch.Size([2, 8, 5, 6])
    """

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """Convolve `input` [N, C, H, W], giving [N, O, oh, ow]. See `deform_conv2d`."""
        return self.convolve(input, offset, mask)


class OffsetBranch(ZeroLayer, DeformConvBase):
    """Regular convolution that predicts the offsets of a deformable one. It starts at zero; see `ZeroLayer`."""

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` [N, C, H, W], giving [N, O, oh, ow]."""
        numbers = (self.stride, self.padding, self.dilation, self.groups)
        return functional.conv2d(input, self.weight, self.bias, *numbers)


class OffsetBranchConv(DeformConvBase):
    """Deformable convolution with a branch `conv_offset` that predicts `channels_per_tap` values per sampling point."""

    channels_per_tap: int
    branch_type: type[ZeroLayer] = OffsetBranch

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        precision: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, *geometry, bias=bias, precision=precision, **options)
        check_divisible("in_channels", in_channels, "deform_groups", deform_groups)
        self.deform_groups = deform_groups
        channels = self.channels_per_tap * self.sampling_points
        branch_geometry = (self.kernel_size, self.stride, self.padding, self.dilation)
        self.conv_offset = self.branch_type(in_channels, channels, *branch_geometry, **options)

    def reset_parameters(self) -> None:
        """Initialise weight and bias again, and set the branch to zero."""
        super().reset_parameters()
        if hasattr(self, "conv_offset"):  # not yet, when the constructor of the base class calls this method
            self.conv_offset.reset_parameters()

    def run_branch(self, input: Tensor) -> Tensor:
        """Check `input` [N, C, H, W] and return the values that the branch predicts.

        The branch does not promote dtypes: without autocast, `input` must have the dtype of the weights.
        """
        if not is_tensor_proxy(input):
            check_input(input, self.in_channels)
            if not torch.compiler.is_compiling():  # a check of a size that can change would fix or bound it
                self._check_extents(input)
            dtype = self.weight.dtype
            if input.dtype != dtype and not is_autocast_enabled(input.device):
                raise DtypeError(f"input must be {dtype} like the layer's weights, got {input.dtype}")
        values: Tensor = self.conv_offset(input)
        return values

    def _check_extents(self, input: Tensor) -> None:
        for axis, size, padding, kernel, stride, dilation in zip(
            ("height", "width"), input.shape[2:], self.padding, self.kernel_size, self.stride, self.dilation
        ):
            output_extent(axis, size, 2 * padding, kernel, stride, dilation)

    @property
    def sampling_points(self) -> int:
        """D*kh*kw, the number of sampling points of an output pixel."""
        return self.deform_groups * math.prod(self.kernel_size)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.deform_groups == 1 else f"{text}, deform_groups={self.deform_groups}"


class DeformConv2dPack(OffsetBranchConv):
    """Deformable convolution layer (v1) that predicts its offsets. It starts as a `torch.nn.Conv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, precision, device, dtype
        See `DeformConv2d`. The branch always has a bias.
    deform_groups : int
        D, the number of deformable groups; divides C.

    Attributes
    ----------
    weight, bias
        See `DeformConv2d`.
    conv_offset : Module, C to 2*D*kh*kw channels
        The branch, a regular convolution with the kernel size, stride, padding and dilation of the layer. Weight and
        bias start at zero. The module is no `torch.nn.Conv2d`, so that code that initialises these leaves it at zero.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DeformConv2dPack
    >>> layer = DeformConv2dPack(4, 8, kernel_size=3, stride=2, padding=1)
    >>> layer(torch.randn(2, 4, 6, 6)).shape
    torch.Size([2, 8, 3, 3])
    >>> layer.conv_offset.weight.shape
    torch.Size([18, 4, 3, 3])
    """

    channels_per_tap = 2

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` [N, C, H, W], giving [N, O, oh, ow]. See `deform_conv2d`."""
        return self.convolve(input, self.run_branch(input))


class ModulatedDeformConv2dPack(OffsetBranchConv):
    """Modulated deformable convolution layer (v2) that predicts its offsets and masks.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, deform_groups, bias
        See `DeformConv2dPack`.
    precision, device, dtype : optional
        See `DeformConv2d`.
    mask_scale : float
        The masks are ``mask_scale * sigmoid(logits)``. With 1, as in the paper, they start at 1/2 and the layer's
        output, apart from the bias, is initially half that of a `torch.nn.Conv2d`. With 2 they start at 1 and both
        outputs are equal.

    Attributes
    ----------
    weight, bias
        See `DeformConv2d`.
    conv_offset : Module, C to 3*D*kh*kw channels
        The branch; see `DeformConv2dPack`. The first ``2*D*kh*kw`` channels are the offsets (dy and dx of the first
        tap, dy and dx of the second, ...), the others the logits of the masks.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ModulatedDeformConv2dPack
    >>> layer = ModulatedDeformConv2dPack(4, 8, kernel_size=3, padding=1, mask_scale=2.0)
    >>> image = torch.randn(2, 4, 6, 6)
    >>> plain = torch.nn.functional.conv2d(image, layer.weight, layer.bias, padding=1)
    >>> torch.allclose(layer(image), plain, atol=1e-5)
    True
    """

    channels_per_tap = 3

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair | str = 0,
        dilation: Pair = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
        *,
        mask_scale: float = 1.0,
        precision: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, dilation, groups, deform_groups, bias)
        super().__init__(in_channels, out_channels, *geometry, precision=precision, device=device, dtype=dtype)
        self.mask_scale = mask_scale

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` [N, C, H, W], giving [N, O, oh, ow]. See `deform_conv2d`."""
        points = self.sampling_points
        offset, logits = self.run_branch(input).split((2 * points, points), dim=1)
        return self.convolve(input, offset, scaled_masks(logits, self.mask_scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask_scale={self.mask_scale}"


def scaled_masks(logits: Tensor, scale: float) -> Tensor:
    """Return ``scale * sigmoid(logits)``, without a multiplication by 1."""
    masks = torch.sigmoid(logits)
    return masks if scale == 1 else scale * masks


def check_input(input: object, channels: int) -> None:
    """Check that the input of a layer is a tensor [N, C, H, W] with `channels` channels."""
    if not isinstance(input, Tensor):
        raise DtypeError(f"input must be a torch.Tensor, got {type_name(input)}")
    if input.ndim != 4 or input.shape[1] != channels:
        raise ShapeError(f"input must be [N, C = {channels}, H, W], got shape {tuple(input.shape)}")


def symmetric_padding(
    padding: Pair | str, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """Return the (vertical, horizontal) padding of a layer."""
    if not isinstance(padding, str):
        return expand_pair("padding", padding, minimum=0)
    (top, bottom), (left, right) = named_padding(padding, kernel_size, stride, dilation)
    if top != bottom or left != right:
        raise ArgumentError(
            f"padding='same' must pad both sides alike in a layer, which kernel_size={kernel_size} does not; "
            "the function deform_conv2d can pad them differently"
        )
    return top, left


def check_divisible(name: str, channels: int, divisor_name: str, divisor: int) -> None:
    if None in map(as_integer, (channels, divisor)) or channels < 1 or divisor < 1 or channels % divisor:
        raise ArgumentError(f"{name} must be a positive multiple of {divisor_name}={divisor}, got {channels}")
