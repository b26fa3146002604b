"""Sizes of multi-scale deformable attention and deformable aggregation; see `dcnops._shapes`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, cast

from dcnops._arguments import (
    MAX_LEVELS,
    Pair,
    Points,
    SpatialShapes,
    as_integer,
    check_offset_scale,
    expand_pair,
    expand_points,
    expand_spatial_shapes,
    shown,
)
from dcnops._errors import ArgumentError, ShapeError
from dcnops._shapes import Shaped, cached, check_below_limit, output_extent

_Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class MSDeformAttnGeometry:
    """Sizes of one multi-scale deformable attention.

    Attributes
    ----------
    N, S, M, D : int
        Batch, pixels of all levels, heads and channels per head of `value` ``[N, S, M, D]``.
    Lq : int
        Number of queries.
    points : tuple of int
        Sampling points per query and head in each level.
    shapes : tuple of (int, int) or None
        Height and width of each level; None if they are in the memory of the device.
    """

    N: int
    S: int
    M: int
    D: int
    Lq: int
    points: tuple[int, ...]
    shapes: tuple[tuple[int, int], ...] | None

    @property
    def L(self) -> int:
        """Number of levels."""
        return len(self.points)

    @property
    def K(self) -> int:
        """Number of sampling points per query and head, in all levels."""
        return sum(self.points)

    @property
    def output_shape(self) -> tuple[int, int, int]:
        return (self.N, self.Lq, self.M * self.D)

    @classmethod
    def of(
        cls,
        value: Shaped,
        spatial_shapes: SpatialShapes,
        sampling_locations: Shaped,
        attention_weights: Shaped,
        points: Points | None = None,
        on_device: bool = False,
    ) -> MSDeformAttnGeometry:
        """Infer every size from the arrays and parameters of one call.

        Only the shapes of the arrays are read. With `on_device`, this also applies to `spatial_shapes`.
        """
        if on_device:
            extents, size = None, tuple(cast(Shaped, spatial_shapes).shape)
            if len(size) != 2 or size[1] != 2 or not 1 <= size[0] <= MAX_LEVELS:
                raise ShapeError(f"spatial_shapes must be [1 <= L <= {MAX_LEVELS}, 2], got shape {size}")
            levels = int(size[0])
        else:
            extents = expand_spatial_shapes(spatial_shapes)
            levels = len(extents)
        arrays = (tuple(value.shape), tuple(sampling_locations.shape), tuple(attention_weights.shape))
        is_flat, per_level = expand_points(points, levels)
        return cls._infer(*arrays, extents, levels, is_flat, per_level)

    @classmethod
    @cached
    def _infer(
        cls,
        value: _Shape,
        locations: _Shape,
        weights: _Shape,
        extents: tuple[tuple[int, int], ...] | None,
        levels: int,
        is_flat: bool,
        points: tuple[int, ...] | None,
    ) -> MSDeformAttnGeometry:
        """Infer the sizes from shapes and expanded parameters; `is_flat` if levels and points share an axis."""
        if len(value) != 4:
            raise ShapeError(f"value must have 4 dimensions [N, S, M, D], got shape {value}")
        N, S, M, D = value
        last = "sum(points)" if is_flat else "L, P"
        if len(locations) != (5 if is_flat else 6):
            raise ShapeError(
                f"sampling_locations must have {5 if is_flat else 6} dimensions [N, Lq, M, {last}, 2], "
                f"got shape {locations}"
            )
        if points is None:
            per_level = locations[4]
            if not per_level:
                raise ShapeError(f"sampling_locations must be [N, Lq, M, L, P >= 1, 2], got shape {locations}")
            points = (per_level,) * levels
        if extents is not None:
            total = sum(height * width for height, width in extents)
            if total != S:
                raise ShapeError(
                    f"spatial_shapes must have a sum of height*width equal to value's S={S}, got {total} for {extents}"
                )
        Lq = locations[1]
        K = sum(points)
        tail = (K,) if is_flat else (levels, points[0])
        described = f"sum(points)={K}" if is_flat else f"L={levels}, P={points[0]}"
        if locations != (N, Lq, M, *tail, 2):
            raise ShapeError(f"sampling_locations must be [N={N}, Lq, M={M}, {described}, 2], got shape {locations}")
        if weights != (N, Lq, M, *tail):
            raise ShapeError(f"attention_weights must be [N={N}, Lq={Lq}, M={M}, {described}], got shape {weights}")
        check_below_limit("value", "S", S)
        check_below_limit("value", "M*D", M * D)
        check_below_limit("sampling_locations", "Lq", Lq)
        check_below_limit("sampling_locations", "coordinates per query", 2 * M * K)
        return cls(N, S, M, D, Lq, points, extents)

    def check_grad_out(self, grad_out: _Shape) -> None:
        """Check the shape of the gradient of the output."""
        if grad_out != self.output_shape:
            needed = f"N={self.N}, Lq={self.Lq}, M*D={self.M * self.D}"
            raise ShapeError(f"grad_out must be [{needed}], got shape {grad_out}")


@dataclass(frozen=True)
class DeformAggregateGeometry:
    """Sizes of one deformable aggregation.

    Attributes
    ----------
    N, H, W : int
        Batch, height and width of `input` ``[N, H, W, G*D]``.
    G, D : int
        Groups and channels per group.
    oh, ow : int
        Output height and width.
    kh, kw, sh, sw, ph, pw, dh, dw : int
        Kernel size, stride, padding and dilation, vertical and horizontal.
    offset_scale : float
        Factor of the kernel's extent and of the offsets.
    remove_center : bool
        True if the kernel has no tap in the middle.
    is_packed : bool
        True if one array holds the offsets and the weights of each group.
    """

    N: int
    H: int
    W: int
    G: int
    D: int
    oh: int
    ow: int
    kh: int
    kw: int
    sh: int
    sw: int
    ph: int
    pw: int
    dh: int
    dw: int
    offset_scale: float
    remove_center: bool
    is_packed: bool

    @property
    def K(self) -> int:
        """Number of taps."""
        return self.kh * self.kw - self.remove_center

    @property
    def taps(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each tap, in the order of the offsets: column by column."""
        middle = (self.kh // 2, self.kw // 2) if self.remove_center else None
        return tuple((i, j) for j in range(self.kw) for i in range(self.kh) if (i, j) != middle)

    @property
    def center(self) -> tuple[int, int]:
        """Distance from the first tap to the middle of the kernel, vertical and horizontal, in pixels."""
        return self.dh * (self.kh - 1) // 2, self.dw * (self.kw - 1) // 2

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (self.N, self.oh, self.ow, self.G * self.D)

    @classmethod
    def of(
        cls,
        input: Shaped,
        offset: Shaped,
        mask: Shaped | None,
        groups: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        dilation: Pair = 1,
        offset_scale: float = 1.0,
        remove_center: bool = False,
    ) -> DeformAggregateGeometry:
        """Infer every size from the arrays and parameters of one call. Only the shapes of the arrays are read."""
        G = as_integer(groups)
        if G is None or G < 1:
            raise ArgumentError(f"groups must be a positive integer, got {shown(groups)}")
        kernel = expand_pair("kernel_size", kernel_size)
        step, sides = expand_pair("stride", stride), expand_pair("padding", padding, 0)
        dilations, scale = expand_pair("dilation", dilation), check_offset_scale(offset_scale)
        if as_integer(remove_center) not in (0, 1):
            raise ArgumentError(f"remove_center must be True or False, got {shown(remove_center)}")
        if remove_center and (kernel == (1, 1) or kernel[0] % 2 == 0 or kernel[1] % 2 == 0):
            raise ArgumentError(f"remove_center must be False unless kernel_size is odd and above 1, got {kernel}")
        mask_shape = None if mask is None else tuple(mask.shape)
        parameters = (G, kernel, step, sides, dilations, scale, bool(remove_center))
        return cls._infer(tuple(input.shape), tuple(offset.shape), mask_shape, *parameters)

    @classmethod
    @cached
    def _infer(
        cls,
        input: _Shape,
        offset: _Shape,
        mask: _Shape | None,
        G: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        offset_scale: float,
        remove_center: bool,
    ) -> DeformAggregateGeometry:
        """Infer the sizes from shapes and expanded parameters."""
        for name, shape in (("input", input), ("offset", offset), ("mask", mask)):
            if shape is not None and len(shape) != 4:
                letters = "N, H, W, C" if name == "input" else "N, oh, ow, channels"
                raise ShapeError(f"{name} must have 4 dimensions [{letters}], got shape {shape}")
        N, H, W, C = input
        if min(H, W) < 1:
            raise ShapeError(f"input must be [N, H >= 1, W >= 1, C], got shape {input}")
        if C % G:
            raise ShapeError(f"input must have C divisible by groups={G}, got shape {input}")
        (kh, kw), (sh, sw), (ph, pw), (dh, dw) = kernel, stride, padding, dilation
        oh = output_extent("height", H, 2 * ph, kh, sh, dh)
        ow = output_extent("width", W, 2 * pw, kw, sw, dw)
        check_below_limit("input", "height*width", H * W)
        check_below_limit("input", "oh*ow", oh * ow)
        check_below_limit("input", "C", C)
        K = kh * kw - remove_center
        check_below_limit("offset", "channels", 3 * G * K + 7)
        if mask is None:
            channels, text = packed_channels(G, K), f"groups*3*{K}={3 * G * K} rounded up to a multiple of 8"
        else:
            channels, text = 2 * G * K, f"groups*2*{K}"
        if offset != (N, oh, ow, channels):
            raise ShapeError(f"offset must be [N={N}, oh={oh}, ow={ow}, {text}={channels}], got shape {offset}")
        if mask is not None and mask != (N, oh, ow, G * K):
            raise ShapeError(f"mask must be [N={N}, oh={oh}, ow={ow}, groups*{K}={G * K}], got shape {mask}")
        return cls(
            N, H, W, G, C // G, oh, ow, kh, kw, sh, sw, ph, pw, dh, dw, offset_scale, remove_center, mask is None
        )  # fmt: skip

    def check_grad_out(self, grad_out: _Shape) -> None:
        """Check the shape of the gradient of the output."""
        if grad_out != self.output_shape:
            needed = f"N={self.N}, oh={self.oh}, ow={self.ow}, C={self.G * self.D}"
            raise ShapeError(f"grad_out must be [{needed}], got shape {grad_out}")


def packed_channels(groups: int, taps: int) -> int:
    """Return the channels of a packed array: two offsets and a weight per tap and group, padded to a multiple of 8."""
    return math.ceil(3 * groups * taps / 8) * 8
