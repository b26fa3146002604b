"""Layers around deformable aggregation: DCNv3 of InternImage and DCNv4."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from dcnops._arguments import as_integer, check_offset_scale, shown
from dcnops._attention_shapes import packed_channels
from dcnops._errors import ArgumentError, ShapeError
from dcnops._shapes import output_extent

from .attention import deform_aggregate
from .deform_conv2d_layers import check_divisible
from .zero_layers import Device

_ACTIVATIONS: dict[str, type[nn.Module]] = {"ReLU": nn.ReLU, "SiLU": nn.SiLU, "GELU": nn.GELU}


class _ChannelsLast(nn.Module):
    """Permutation of [N, C, H, W] to [N, H, W, C]."""

    def forward(self, input: Tensor) -> Tensor:
        return input.permute(0, 2, 3, 1)


class _AggregateBase(nn.Module):
    """Numbers that DCNv3 and DCNv4 have in common, and the blend of input and output by groups."""

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int,
        pad: int,
        dilation: int,
        group: int,
        offset_scale: float,
        center_feature_scale: bool,
        remove_center: bool,
    ) -> None:
        super().__init__()
        check_divisible("channels", channels, "group", group)
        sizes = {"kernel_size": kernel_size, "stride": stride, "pad": pad, "dilation": dilation}
        for name, size in sizes.items():
            minimum = 0 if name == "pad" else 1
            if as_integer(size) is None or size < minimum:
                raise ArgumentError(f"{name} must be an integer of at least {minimum}, got {shown(size)}")
        check_offset_scale(offset_scale)
        if remove_center and (kernel_size % 2 == 0 or kernel_size == 1):
            raise ArgumentError(f"kernel_size must be odd and above 1 with remove_center=True, got {kernel_size}")
        self.channels = channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.pad = pad
        self.dilation = dilation
        self.group = group
        self.offset_scale = offset_scale
        self.center_feature_scale = center_feature_scale
        self.remove_center = bool(remove_center)
        self.taps = kernel_size**2 - self.remove_center

    def _add_center_feature_scale(self, device: Device, dtype: torch.dtype | None) -> None:
        if self.center_feature_scale:
            zeros = torch.zeros(self.group, self.channels, device=device, dtype=dtype)
            self.center_feature_scale_proj_weight = nn.Parameter(zeros)
            self.center_feature_scale_proj_bias = nn.Parameter(zeros[:, 0].clone())

    def _reset_center_feature_scale(self) -> None:
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    def check_input(self, input: Tensor, axes: str) -> None:
        if input.ndim != axes.count(",") + 1 or input.shape[-1] != self.channels:
            raise ShapeError(f"input must be [{axes}={self.channels}], got shape {tuple(input.shape)}")

    def aggregate(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            kernel = 2 * self.pad, self.kernel_size, self.stride, self.dilation
            size = [output_extent(axis, n, *kernel) for axis, n in zip(("height", "width"), input.shape[1:3])]
            if size != list(offset.shape[1:3]):
                raise ShapeError(
                    f"pad must keep the size of images, as dilation*(kernel_size - 1)/2="
                    f"{self.dilation * (self.kernel_size - 1) / 2:g} does, got {self.pad}: offsets are predicted for "
                    f"{list(offset.shape[1:3])} pixels, and the output has {size}"
                )
        return deform_aggregate(
            input,
            offset,
            mask,
            groups=self.group,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.pad,
            dilation=self.dilation,
            offset_scale=self.offset_scale,
            remove_center=self.remove_center,
        )

    def blend(self, output: Tensor, input: Tensor, features: Tensor) -> Tensor:
        """Mix input and output, with a share that `features` predict for each group."""
        weight, bias = self.center_feature_scale_proj_weight, self.center_feature_scale_proj_bias
        share = functional.linear(features, weight, bias).sigmoid()
        share = share.repeat_interleave(self.channels // self.group, dim=-1)
        return output * (1 - share) + input * share

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, stride={self.stride}, pad={self.pad}"
        text += f", dilation={self.dilation}, group={self.group}, offset_scale={self.offset_scale}"
        flags = [name for name in ("center_feature_scale", "remove_center") if getattr(self, name)]
        return ", ".join([text, *(f"{name}=True" for name in flags)])


class DCNv3(_AggregateBase):
    """Layer of InternImage: a depthwise convolution predicts offsets and softmax weights for `deform_aggregate`.

    Constructor, initialisation and state dict are those of InternImage, and images have the channels last.

    Parameters
    ----------
    channels : int
        C, a multiple of `group`. Any number of channels per group works.
    kernel_size, stride, pad, dilation : int
        Of the aggregation. Offsets and weights are predicted at every `stride`-th pixel, so `pad` must keep the size
        of images but for the stride.
    dw_kernel_size : int, optional
        Kernel size of the depthwise convolution; `kernel_size` by default.
    group : int
        Groups, which share offsets and weights.
    offset_scale : float
        See `deform_aggregate`.
    act_layer : "GELU", "ReLU" or "SiLU"
    norm_layer : "LN" or "BN"
        Normalisation after the depthwise convolution.
    center_feature_scale : bool
        Mix the layer's input into its output, as in InternImage-H.
    remove_center : bool
        Leave out the tap in the middle.
    device, dtype : optional
        Of the parameters.

    Raises
    ------
    ArgumentError
        A parameter is out of range.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DCNv3
    >>> layer = DCNv3(channels=16, group=4)
    >>> layer(torch.randn(1, 7, 9, 16)).shape
    torch.Size([1, 7, 9, 16])
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        dw_kernel_size: int | None = None,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        act_layer: str = "GELU",
        norm_layer: str = "LN",
        center_feature_scale: bool = False,
        remove_center: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        numbers = (kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale, remove_center)
        super().__init__(channels, *numbers)
        if act_layer not in _ACTIVATIONS or norm_layer not in ("LN", "BN"):
            raise ArgumentError(
                f"act_layer must be one of {list(_ACTIVATIONS)} and norm_layer 'LN' or 'BN', "
                f"got {act_layer!r} and {norm_layer!r}"
            )
        size = self.dw_kernel_size = dw_kernel_size or kernel_size
        options = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = [_ChannelsLast(), nn.LayerNorm(channels, eps=1e-6, **options)]  # type: ignore[arg-type]
        if norm_layer == "BN":
            layers = [nn.BatchNorm2d(channels, **options), _ChannelsLast()]  # type: ignore[arg-type]
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, size, padding=(size - 1) // 2, groups=channels, **options),  # type: ignore[arg-type]
            nn.Sequential(*layers),
            _ACTIVATIONS[act_layer](),
        )
        self.offset = nn.Linear(channels, group * self.taps * 2, device=device, dtype=dtype)
        self.mask = nn.Linear(channels, group * self.taps, device=device, dtype=dtype)
        self.input_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.output_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
        self._add_center_feature_scale(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set offsets and the logits of the weights to zero, and draw the projections by Xavier's rule."""
        for layer in (self.offset, self.mask):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._reset_center_feature_scale()

    def forward(self, input: Tensor) -> Tensor:
        """Map `input` [N, H, W, C] to [N, oh, ow, C]."""
        self.check_input(input, "N, H, W, C")
        projected = self.input_proj(input)
        features = self.dw_conv(input.permute(0, 3, 1, 2))[:, :: self.stride, :: self.stride]
        mask = self.mask(features).unflatten(-1, (self.group, self.taps)).softmax(-1).flatten(-2)
        output = self.aggregate(projected, self.offset(features), mask)
        if self.center_feature_scale:
            output = self.blend(output, projected[:, :: self.stride, :: self.stride], features)
        result: Tensor = self.output_proj(output)
        return result


class DCNv4(_AggregateBase):
    """Layer of DCNv4: offsets and weights are a linear function of the input, and the weights have no softmax.

    Constructor, initialisation and state dict are those of the package DCNv4. Images come as sequences of pixels.

    Parameters
    ----------
    channels, kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale, remove_center
        As in `DCNv3`.
    dw_kernel_size : int, optional
        Kernel size of a depthwise convolution before the prediction; none by default.
    output_bias : bool
        Add a bias in the output projection.
    without_pointwise : bool
        Leave out the projections of input and output.
    device, dtype : optional
        Of the parameters.

    Raises
    ------
    ArgumentError
        A parameter is out of range.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import DCNv4
    >>> layer = DCNv4(channels=16, group=4)
    >>> layer(torch.randn(1, 7 * 9, 16), shape=(7, 9)).shape
    torch.Size([1, 63, 16])
    """

    def __init__(
        self,
        channels: int = 64,
        kernel_size: int = 3,
        stride: int = 1,
        pad: int = 1,
        dilation: int = 1,
        group: int = 4,
        offset_scale: float = 1.0,
        dw_kernel_size: int | None = None,
        center_feature_scale: bool = False,
        remove_center: bool = False,
        output_bias: bool = True,
        without_pointwise: bool = False,
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        numbers = (kernel_size, stride, pad, dilation, group, offset_scale, center_feature_scale, remove_center)
        super().__init__(channels, *numbers)
        self.dw_kernel_size = size = dw_kernel_size
        self.without_pointwise = without_pointwise
        if size is not None:
            padding = (size - 1) // 2
            self.offset_mask_dw = nn.Conv2d(
                channels, channels, size, padding=padding, groups=channels, device=device, dtype=dtype
            )
        self.offset_mask = nn.Linear(channels, packed_channels(group, self.taps), device=device, dtype=dtype)
        if not without_pointwise:
            self.value_proj = nn.Linear(channels, channels, device=device, dtype=dtype)
            self.output_proj = nn.Linear(channels, channels, bias=output_bias, device=device, dtype=dtype)
        self._add_center_feature_scale(device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set offsets and weights to zero, and draw the projections by Xavier's rule. The output starts at its bias."""
        nn.init.zeros_(self.offset_mask.weight)
        nn.init.zeros_(self.offset_mask.bias)
        if not self.without_pointwise:
            for layer in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        self._reset_center_feature_scale()

    def forward(self, input: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
        """Map `input` [N, H*W, C] to [N, oh*ow, C].

        Parameters
        ----------
        input : Tensor [N, H*W, C]
        shape : (H, W), optional
            Without it, images are square.
        """
        self.check_input(input, "N, H*W, C")
        pixels = input.shape[1]
        H, W = (math.isqrt(pixels),) * 2 if shape is None else shape
        if not torch.compiler.is_compiling() and pixels != H * W:
            raise ShapeError(f"input must be [N, H*W={H * W}, C] for shape {(H, W)}, got shape {tuple(input.shape)}")
        image = input.unflatten(1, (H, W))
        values = image if self.without_pointwise else self.value_proj(image)
        features = image
        if self.dw_kernel_size is not None:
            features = self.offset_mask_dw(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        packed = self.offset_mask(features[:, :: self.stride, :: self.stride])
        output = self.aggregate(values, packed)
        if self.center_feature_scale:
            output = self.blend(output, values[:, :: self.stride, :: self.stride], output)
        output = output.flatten(1, 2)
        result: Tensor = output if self.without_pointwise else self.output_proj(output)
        return result
