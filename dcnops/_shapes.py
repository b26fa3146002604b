"""Sizes of an operation, inferred from the shapes and checked once.

A geometry holds everything that a backend needs to know about a call except the arrays. All shape errors are raised
here, before any memory is allocated.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Protocol, TypeAlias, TypeVar, cast

from dcnops._arguments import MAX_EXTENT, Padding, Pair, check_sampling, expand_padding, expand_pair
from dcnops._errors import ArgumentError, ShapeError
from dcnops._layout import NCHW, Layout

_MAX_PIXELS = 2**31
_Function = TypeVar("_Function", bound=Callable[..., Any])
ImageStrides: TypeAlias = tuple[int, int, int]
"""Strides between the images, channels and pixels of an array [N, C, H, W], in elements."""

_SIZE_NAMES = ("N", "C", "H", "W", "oh", "ow", "kh", "kw", "sh", "sw", "dh", "dw", "pad_top", "pad_left", "G", "D")


def cached(function: _Function) -> _Function:
    """Cache results, except for sizes without a hash: the symbolic sizes of a trace (`torch.SymInt`)."""
    cached = functools.lru_cache(maxsize=256)(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        try:
            return cached(*args)
        except TypeError:
            return function(*args)

    return cast(_Function, call)


class Shaped(Protocol):
    """Anything with a shape, such as an array of any library or a tensor."""

    @property
    def shape(self) -> Any: ...


class SamplingStrides(ctypes.Structure):
    """Strides of offsets and masks, or of their gradients (`SamplingStrides` in dcn/deform_conv2d.cuh)."""

    _fields_ = [
        *((name, ctypes.c_longlong) for name in ("offset_image", "mask_image")),
        *((name, ctypes.c_int) for name in ("offset_channel", "offset_pixel", "mask_channel", "mask_pixel")),
    ]

    @classmethod
    def of(cls, offset: ImageStrides, mask: ImageStrides) -> SamplingStrides:
        return cls(offset[0], mask[0], *offset[1:], *mask[1:])


class DeformConvSizes(ctypes.Structure):
    """Sizes as every deformable convolution kernel takes them (`DeformConvSizes` in dcn/deform_conv2d.cuh)."""

    _fields_ = [*((name, ctypes.c_int) for name in _SIZE_NAMES), ("stride", SamplingStrides)]


@dataclass(frozen=True)
class DeformConvGeometry:
    """Sizes of one deformable convolution.

    Attributes
    ----------
    N, C, H, W : int
        Batch, channels, height and width of `input`.
    O, kh, kw : int
        Output channels and kernel size of `weight` ``[O, C/G, kh, kw]``.
    oh, ow : int
        Output height and width.
    sh, sw, dh, dw : int
        Stride and dilation, vertical and horizontal.
    pad_top, pad_bottom, pad_left, pad_right : int
        Zero padding on each side, in pixels.
    G, D : int
        Weight groups and deformable groups.
    """

    N: int
    C: int
    H: int
    W: int
    O: int
    kh: int
    kw: int
    oh: int
    ow: int
    sh: int
    sw: int
    dh: int
    dw: int
    pad_top: int
    pad_bottom: int
    pad_left: int
    pad_right: int
    G: int
    D: int

    @functools.cached_property
    def _hash(self) -> int:
        return hash(astuple(self))

    def __hash__(self) -> int:
        return self._hash

    @property
    def K(self) -> int:
        """Number of kernel taps."""
        return self.kh * self.kw

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.O, self.oh, self.ow)

    @property
    def pixels(self) -> int:
        """Number of output pixels per image."""
        return self.oh * self.ow

    def params(self, offset_strides: ImageStrides, mask_strides: ImageStrides) -> DeformConvSizes:
        """Return the struct for the kernels."""
        strides = SamplingStrides.of(offset_strides, mask_strides)
        return DeformConvSizes(*(getattr(self, name) for name in _SIZE_NAMES), strides)

    @classmethod
    def of(
        cls,
        input: Shaped,
        offset: Shaped,
        weight: Shaped,
        bias: Shaped | None,
        mask: Shaped | None,
        stride: Pair,
        padding: Padding,
        dilation: Pair,
        layout: Layout = NCHW,
    ) -> DeformConvGeometry:
        """Infer every size from the arrays and parameters of one call.

        Only the shapes of the arrays are read. `layout` is that of `input`, `offset` and `mask`.
        """
        shapes = (tuple(input.shape), tuple(offset.shape), tuple(weight.shape))
        mask_shape = None if mask is None else tuple(mask.shape)
        check_conv_ranks(*shapes, mask_shape, layout)
        strides, sides = expand_pair("stride", stride), expand_padding(padding)
        dilations = expand_pair("dilation", dilation)
        bias_shape = None if bias is None else tuple(bias.shape)
        return cls._infer(*shapes, bias_shape, mask_shape, strides, sides, dilations, layout)

    @classmethod
    @cached
    def _infer(
        cls,
        input: tuple[int, ...],
        offset: tuple[int, ...],
        weight: tuple[int, ...],
        bias: tuple[int, ...] | None,
        mask: tuple[int, ...] | None,
        stride: tuple[int, int],
        padding: tuple[tuple[int, int], tuple[int, int]],
        dilation: tuple[int, int],
        layout: Layout,
    ) -> DeformConvGeometry:
        """Infer the sizes from shapes of the right rank and expanded parameters."""
        N, C, H, W = _image_sizes(input, layout)
        if min(weight) < 1:
            raise ShapeError(f"weight must be [O >= 1, C/G >= 1, kh >= 1, kw >= 1], got shape {weight}")
        O, channels_per_group, kh, kw = weight
        (sh, sw), (dh, dw) = stride, dilation
        (pad_top, pad_bottom), (pad_left, pad_right) = padding
        if C % channels_per_group:
            raise ShapeError(f"weight must be [O, C/G, kh, kw] with C/G a divisor of input's C={C}, got shape {weight}")
        G = C // channels_per_group
        if O % G:
            raise ShapeError(
                f"weight must have O divisible by the G=C/weight.shape[1]={G} weight groups, got shape {weight}"
            )
        oh = output_extent("height", H, pad_top + pad_bottom, kh, sh, dh)
        ow = output_extent("width", W, pad_left + pad_right, kw, sw, dw)

        check_below_limit("input", "height*width", H * W)
        check_below_limit("input", "oh*ow", oh * ow)

        K = kh * kw
        channels = layout.sizes(offset)[1]
        needed = layout.text(f"N={N}", f"2*D*{kh}*{kw}", f"oh={oh}", f"ow={ow}")
        if offset != layout.shape(N, channels, oh, ow) or channels % (2 * K) or not channels:
            raise ShapeError(f"offset must be [{needed}], got shape {offset}")
        D = channels // (2 * K)
        if C % D:
            raise ShapeError(
                f"offset must be [{needed}] with D a divisor of input's C={C}, got shape {offset}, that is D={D}"
            )
        if mask is not None and mask != layout.shape(N, D * K, oh, ow):
            needed = layout.text(f"N={N}", f"D*kh*kw={D}*{kh}*{kw}", f"oh={oh}", f"ow={ow}")
            raise ShapeError(f"mask must be [{needed}], got shape {mask}")
        if bias is not None and bias != (O,):
            raise ShapeError(f"bias must be [O={O}], got shape {bias}")
        return cls(
            N, C, H, W, O, kh, kw, oh, ow, sh, sw, dh, dw, pad_top, pad_bottom, pad_left, pad_right, G, D
        )  # fmt: skip

    def check_grad_out(self, grad_out: tuple[int, ...], layout: Layout = NCHW) -> None:
        """Check the shape of the gradient of the output, in `layout`."""
        _check_grad_out(grad_out, layout, N=self.N, O=self.O, oh=self.oh, ow=self.ow)


class DeformRoIPoolSizes(ctypes.Structure):
    """Sizes as every deformable RoI pooling kernel takes them (`DeformRoIPoolSizes` in dcn/roi_bins.cuh)."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("N", "C", "H", "W", "R", "P", "Q", "sampling_ratio")),
        ("spatial_scale", ctypes.c_double),
        ("gamma", ctypes.c_double),
    ]


@dataclass(frozen=True)
class DeformRoIPoolGeometry:
    """Sizes and sampling parameters of one deformable RoI pooling.

    Attributes
    ----------
    N, C, H, W : int
        Batch, channels, height and width of `input`.
    R : int
        Number of regions.
    P, Q : int
        Bins per region, vertical and horizontal.
    sampling_ratio : int
        Samples per bin along an axis; 0 for one per pixel of the bin.
    spatial_scale : float
        Pixels of `input` per unit of the region coordinates.
    gamma : float
        Factor of the offsets.
    """

    N: int
    C: int
    H: int
    W: int
    R: int
    P: int
    Q: int
    sampling_ratio: int
    spatial_scale: float
    gamma: float

    @property
    def bins(self) -> int:
        """Number of bins per region."""
        return self.P * self.Q

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.R, self.C, self.P, self.Q)

    def params(self) -> DeformRoIPoolSizes:
        """Return the struct for the kernels."""
        return DeformRoIPoolSizes(**vars(self))

    @classmethod
    def of(
        cls,
        input: Shaped,
        rois: Shaped,
        offset: Shaped | None,
        mask: Shaped | None,
        output_size: Pair,
        spatial_scale: float,
        sampling_ratio: int,
        gamma: float,
        layout: Layout = NCHW,
    ) -> DeformRoIPoolGeometry:
        """Infer every size from the arrays and check the parameters of one call.

        Only the shapes of the arrays are read. `layout` is that of `input`.
        """
        shape = tuple(input.shape)
        check_roi_ranks(shape, tuple(rois.shape), layout)
        N, C, H, W = _image_sizes(shape, layout)
        check_below_limit("input", "height*width", H * W)
        R = rois.shape[0]
        P, Q = expand_pair("output_size", output_size)
        check_below_limit("output_size", "bins", P * Q)
        ratio, scale, factor = check_sampling(sampling_ratio, spatial_scale, gamma)
        if offset is not None and tuple(offset.shape) != (R, 2, P, Q):
            raise ShapeError(f"offset must be [R={R}, 2, P={P}, Q={Q}], got shape {tuple(offset.shape)}")
        if mask is not None and tuple(mask.shape) != (R, P, Q):
            raise ShapeError(f"mask must be [R={R}, P={P}, Q={Q}], got shape {tuple(mask.shape)}")
        return cls(N, C, H, W, R, P, Q, ratio, scale, factor)

    def check_grad_out(self, grad_out: tuple[int, ...], layout: Layout = NCHW) -> None:
        """Check the shape of the gradient of the output, in `layout`."""
        _check_grad_out(grad_out, layout, R=self.R, C=self.C, P=self.P, Q=self.Q)


@cached
def check_conv_ranks(
    input: tuple[int, ...],
    offset: tuple[int, ...],
    weight: tuple[int, ...],
    mask: tuple[int, ...] | None,
    layout: Layout = NCHW,
) -> None:
    """Check the number of dimensions of the arrays of a convolution."""
    for name, shape, order, letters in (
        ("input", input, layout, ("N", "C", "H", "W")),
        ("weight", weight, NCHW, ("O", "C/G", "kh", "kw")),
        ("offset", offset, layout, ("N", "2*D*kh*kw", "oh", "ow")),
        ("mask", mask, layout, ("N", "D*kh*kw", "oh", "ow")),
    ):
        if shape is not None and len(shape) != 4:
            raise ShapeError(f"{name} must have 4 dimensions [{order.text(*letters)}], got shape {shape}")


def check_roi_ranks(input: tuple[int, ...], rois: tuple[int, ...], layout: Layout = NCHW) -> None:
    """Check the number of dimensions of feature maps and regions."""
    if len(input) != 4:
        raise ShapeError(f"input must have 4 dimensions [{layout.text('N', 'C', 'H', 'W')}], got shape {input}")
    if len(rois) != 2 or rois[1] != 5:
        raise ShapeError(f"rois must be [R, 5] (image, x1, y1, x2, y2), got shape {rois}")


def _image_sizes(input: tuple[int, ...], layout: Layout) -> tuple[int, int, int, int]:
    N, C, H, W = layout.sizes(input)
    if min(C, H, W) < 1:
        raise ShapeError(f"input must be [{layout.text('N', 'C >= 1', 'H >= 1', 'W >= 1')}], got shape {input}")
    return N, C, H, W


def _check_grad_out(grad_out: tuple[int, ...], layout: Layout, **sizes: int) -> None:
    if grad_out != layout.shape(*sizes.values()):
        needed = layout.text(*(f"{name}={size}" for name, size in sizes.items()))
        raise ShapeError(f"grad_out must be [{needed}], got shape {grad_out}")


def check_below_limit(argument: str, quantity: str, number: int) -> None:
    """Check a number that kernels hold in 32 bits."""
    if number >= _MAX_PIXELS:
        raise ShapeError(f"{argument} must have {quantity} below {_MAX_PIXELS}, got {number}")


def output_extent(axis: str, size: int, padding: int, kernel: int, stride: int, dilation: int) -> int:
    """Return the output size of a convolution along one axis; `padding` is the sum of both sides."""
    padded, reach = size + padding, dilation * (kernel - 1) + 1
    if padded > MAX_EXTENT:
        raise ArgumentError(
            f"padding must keep input's {axis} within {MAX_EXTENT} pixels, got {size} + {padding} = {padded}"
        )
    if padded < reach:
        raise ShapeError(
            f"input must have a padded {axis} of at least dilation*(kernel-1)+1 = {reach}, "
            f"got {size} + {padding} = {padded}"
        )
    return (padded - reach) // stride + 1
