"""Multi-scale deformable attention and deformable aggregation on PyTorch tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from dcnops._arguments import (
    Pair,
    Points,
    SpatialShapes,
    check_offset_scale,
    expand_pair,
    expand_points,
    expand_spatial_shapes,
)
from dcnops._errors import DeviceError, DtypeError

from . import attention_eager, attention_operators, eager
from .devices import is_autocast_enabled
from .functional import are_floating, call_operator, check_tensors, promote_dtypes, tensor_proxies


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    points: Points | None = None,
) -> Tensor:
    """Compute multi-scale deformable attention of tensors.

    See `dcnops.ms_deform_attn` for the formula. CPU tensors are passed to the CPU backend, CUDA tensors to the kernels,
    without a copy, on torch's current stream and with torch's memory. First and second gradients, compilation and
    export are supported.

    Parameters
    ----------
    value : Tensor [N, S, M, D], float16, bfloat16, float32 or float64
        Pixels of L feature maps, row by row, one map after the other; M heads of D channels.
    spatial_shapes : sequence of L (h, w), or integer Tensor [L, 2]
        Sizes of the feature maps. A tensor may be on the CPU, or on the GPU of `value`: the kernels then read it
        there, and the host does not wait for it.
    sampling_locations : Tensor [N, Lq, M, L, P, 2], or [N, Lq, M, sum(points), 2] for a sequence of `points`
        Sampling points (x, y) as fractions of the feature maps: (0, 0) is the upper left corner of the first pixel,
        and (1, 1) the lower right corner of the last.
    attention_weights : Tensor [N, Lq, M, L, P], or [N, Lq, M, sum(points)] for a sequence of `points`
    points : int or sequence of L int, optional
        Sampling points P of a head on each feature map. A sequence gives every map a number of its own.

    Returns
    -------
    Tensor [N, Lq, M*D]

    Raises
    ------
    ShapeError
        A tensor has the wrong rank or size, or `spatial_shapes` on the host do not have S pixels.
    ArgumentError
        `spatial_shapes` or `points` is invalid.
    DtypeError
        An argument is not a tensor, or its dtype is not supported.
    DeviceError
        The tensors are on different devices, or on a device that is neither a CPU nor a CUDA GPU.

    Notes
    -----
    Mixed dtypes: under autocast, `value` is converted to autocast's dtype; float64 is kept. `sampling_locations` and
    `attention_weights` are converted to the dtype of `value`, with one exception: next to a 16-bit `value`, they are
    converted to float32 unless both already are 16-bit. A location in bfloat16 is off by up to half a pixel on a map
    200 pixels wide, so it is better to leave them in float32.

    The notes of `deform_conv2d` on compilation, `torch.func` and second gradients apply.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import ms_deform_attn
    >>> value = torch.arange(6.0).reshape(1, 6, 1, 1)  # a map of 2 x 2 pixels, and one of 1 x 2
    >>> locations = torch.full((1, 1, 1, 2, 1, 2), 0.5)  # the centers of both maps
    >>> weights = torch.tensor([0.25, 0.75]).reshape(1, 1, 1, 2, 1)
    >>> ms_deform_attn(value, [(2, 2), (1, 2)], locations, weights)  # 0.25 * 1.5 + 0.75 * 4.5
    tensor([[[3.7500]]])
    """
    is_tensor = isinstance(spatial_shapes, Tensor)
    optional = (spatial_shapes,) if is_tensor else ()
    tensors = (value, sampling_locations, attention_weights)
    if not torch.compiler.is_compiling() and eager.is_plain(tensors, optional):
        if is_autocast_enabled(value.device) and are_floating(tensors):
            (value,), (sampling_locations, attention_weights) = promote_dtypes(tensors[:1], tensors[1:])
        output = attention_eager.ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights, points)
        if output is not None:
            return output
    if proxies := tensor_proxies(*tensors, spatial_shapes):
        arguments = (value, spatial_shapes, sampling_locations, attention_weights)
        return handle_torch_function(ms_deform_attn, proxies, *arguments, points=points)
    names = ("value", "sampling_locations", "attention_weights")
    check_tensors("ms_deform_attn", dict(zip(names, tensors)), {})
    (value,), (sampling_locations, attention_weights) = promote_dtypes(tensors[:1], tensors[1:])
    shapes = [] if is_tensor else _flat_shapes(spatial_shapes)
    if is_tensor:
        _check_shapes_tensor(spatial_shapes, value)
    tensor = spatial_shapes if is_tensor else None
    is_flat, per_level = expand_points(points, len(spatial_shapes) if is_tensor else len(shapes) // 2)
    arrays = (value, tensor, sampling_locations, attention_weights)
    return call_operator(attention_operators.ms_deform_attn, *arrays, shapes, per_level or [], is_flat)


def deform_aggregate(
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None = None,
    *,
    groups: int,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    offset_scale: float = 1.0,
    remove_center: bool = False,
) -> Tensor:
    """Compute the core of DCNv3, or with one packed tensor that of DCNv4.

    See `dcnops.deform_aggregate` for the formula, and `deform_conv2d` for memory, gradients and mixed dtypes.

    Parameters
    ----------
    input : Tensor [N, H, W, C], float16, bfloat16, float32 or float64
        Images with the channels last.
    offset : Tensor [N, oh, ow, groups*K*2], in pixels; without `mask` [N, oh, ow, channels]
        Offsets (x, y) of K taps: kh*kw, or one less with `remove_center`. The kernel's column is the outer loop, its
        row the inner one. Without `mask`, a packed tensor: for each group 2*K offsets and K weights, and the last axis
        padded to a multiple of 8.
    mask : Tensor [N, oh, ow, groups*K], optional
        Weights of the taps.
    groups : int
        Groups of C/groups channels, which share offsets and weights.
    kernel_size, stride, padding, dilation : int or (vertical, horizontal)
    offset_scale : float
        Factor of the distance of a sampling point from the center of the kernel.
    remove_center : bool
        Leave out the tap in the middle.

    Returns
    -------
    Tensor [N, oh, ow, C]

    Raises
    ------
    ShapeError
        A tensor has the wrong rank or size.
    ArgumentError
        A parameter is invalid.
    DtypeError, DeviceError
        See `deform_conv2d`.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import deform_aggregate
    >>> image = torch.arange(16.0).reshape(1, 4, 4, 1)
    >>> offset = torch.zeros(1, 4, 4, 2)
    >>> offset[..., 0] = 0.5  # every sampling point half a pixel to the right
    >>> deform_aggregate(image, offset, torch.ones(1, 4, 4, 1), groups=1, kernel_size=1)[0, 0, :, 0]
    tensor([0.5000, 1.5000, 2.5000, 1.5000])
    """
    numbers = (groups, kernel_size, stride, padding, dilation, offset_scale, remove_center)
    if not torch.compiler.is_compiling() and eager.is_plain((input, offset), (mask,)):
        if is_autocast_enabled(input.device) and are_floating((input, offset, mask)):
            (input,), (offset, mask) = promote_dtypes((input,), (offset, mask))
        output = attention_eager.deform_aggregate(input, offset, mask, *numbers)
        if output is not None:
            return output
    if proxies := tensor_proxies(input, offset, mask):
        names = ("groups", "kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center")
        options: dict[str, Any] = dict(zip(names, numbers))
        return handle_torch_function(deform_aggregate, proxies, input, offset, mask, **options)
    check_tensors("deform_aggregate", {"input": input, "offset": offset}, {"mask": mask})
    (input,), (offset, mask) = promote_dtypes((input,), (offset, mask))
    pairs = expand_pair("kernel_size", kernel_size), expand_pair("stride", stride)
    sides, dilations = expand_pair("padding", padding, 0), expand_pair("dilation", dilation)
    arguments = (groups, *pairs, sides, dilations, check_offset_scale(offset_scale), bool(remove_center))
    return call_operator(attention_operators.deform_aggregate, input, offset, mask, *arguments)


def _flat_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    # A comparison of symbolic sizes becomes a guard of the compiled program.
    pairs = spatial_shapes if torch.compiler.is_compiling() else expand_spatial_shapes(spatial_shapes)
    return [extent for pair in pairs for extent in pair]


def _check_shapes_tensor(spatial_shapes: Tensor, value: Tensor) -> None:
    if spatial_shapes.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"spatial_shapes must be int32 or int64, got {spatial_shapes.dtype}")
    if spatial_shapes.device.type != "cpu" and spatial_shapes.device != value.device:
        raise DeviceError(
            f"spatial_shapes must be on the CPU or on {value.device} like value, got {spatial_shapes.device}"
        )
