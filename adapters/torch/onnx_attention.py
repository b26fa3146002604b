"""Translations of multi-scale deformable attention and deformable aggregation to ONNX, see `onnx`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from dcnops._attention_shapes import packed_channels

from .onnx_nodes import cast, check_opset, constant_of, data_types, fixed_size, opset


def ms_deform_attn(
    value: Any,
    spatial_shapes: Any,
    sampling_locations: Any,
    attention_weights: Any,
    shapes: Sequence[Any],
    points: Sequence[int],
    is_flat: bool,
) -> Any:
    """Sample each level with ``GridSample``. `spatial_shapes` may be an input of the model."""
    check_opset()
    op, compute_type = opset(), _compute_type(value)
    M, D = (fixed_size("value's heads and channels", size) for size in value.shape[2:])
    if is_flat:
        numbers = list(points)
    else:
        L, P = (fixed_size("sampling_locations' levels and points", size) for size in sampling_locations.shape[3:5])
        numbers = [P] * L
    K = sum(numbers)
    if spatial_shapes is None:
        extents = [_as_vector(extent) for extent in shapes]
    else:
        flat = op.Reshape(op.Cast(spatial_shapes, to=int(data_types().INT64)), [-1])
        extents = [op.Slice(flat, [i], [i + 1], [0]) for i in range(2 * len(numbers))]
    queries = op.Shape(sampling_locations, start=1, end=2)
    locations = op.Reshape(cast(sampling_locations, compute_type), [0, 0, M, K, 2])
    grid = op.Transpose(_to_grid(locations, compute_type), perm=[0, 2, 1, 3, 4])
    pixels = op.Transpose(cast(value, compute_type), perm=[0, 2, 3, 1])
    samples, start = [], _as_vector(0)
    for n, end_point, h, w in zip(numbers, accumulate(numbers), extents[::2], extents[1::2]):
        end = op.Add(start, op.Mul(h, w))
        image = op.Reshape(op.Slice(pixels, start, end, [3]), _sizes(-1, D, h, w))
        level = op.Slice(grid, [end_point - n], [end_point], [3])
        samples.append(_grid_sample(image, op.Reshape(level, _sizes(-1, queries, n, 2))))
        start = end
    every = op.Concat(*samples, axis=3) if len(samples) > 1 else samples[0]
    weights = op.Transpose(op.Reshape(cast(attention_weights, compute_type), [0, 0, M, K]), perm=[0, 2, 1, 3])
    summed = _weighted_sum(every, op.Reshape(weights, _sizes(-1, 1, queries, K)))
    output = op.Transpose(op.Reshape(summed, _sizes(-1, M * D, queries)), perm=[0, 2, 1])
    return _cast_back(output, value.dtype, compute_type)


def deform_aggregate(
    input: Any,
    offset: Any,
    mask: Any,
    groups: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    offset_scale: float,
    remove_center: bool,
) -> Any:
    """Sample the image of each group with ``GridSample``."""
    check_opset()
    op, compute_type = opset(), _compute_type(input)
    kh, kw = kernel_size
    middle = (kh // 2, kw // 2) if remove_center else None
    taps = [(i, j) for j in range(kw) for i in range(kh) if (i, j) != middle]
    K, channels = len(taps), fixed_size("input's channels", input.shape[3])
    offset = cast(offset, compute_type)
    if mask is None:
        if packed_channels(groups, K) != 3 * groups * K:
            offset = op.Slice(offset, [0], [3 * groups * K], [3])
        packed = op.Reshape(offset, [0, 0, 0, groups, 3 * K])
        offset, weights = op.Slice(packed, [0], [2 * K], [4]), op.Slice(packed, [2 * K], [3 * K], [4])
        offset = op.Reshape(offset, [0, 0, 0, groups * K * 2])
    else:
        weights = op.Reshape(cast(mask, compute_type), [0, 0, 0, groups, K])
    shift = op.Reshape(offset, [0, 0, 0, groups * K, 2])
    coordinates = []
    for axis in (1, 0):  # x, then y
        start = _tap_positions(offset, axis, taps, stride, padding, dilation, kernel_size, offset_scale, compute_type)
        along = op.Reshape(op.Slice(shift, [1 - axis], [2 - axis], [4]), [0, 0, 0, groups, K])
        position = start + along * constant_of(offset_scale, compute_type)
        extent = cast(op.Shape(input, start=axis + 1, end=axis + 2), compute_type)
        fraction = (position + constant_of(0.5, compute_type)) / extent
        coordinates.append(op.Unsqueeze(fraction, [5]))
    grid = op.Transpose(_to_grid(op.Concat(*coordinates, axis=5), compute_type), perm=[0, 3, 1, 2, 4, 5])
    rows, columns = op.Shape(offset, start=1, end=2), op.Shape(offset, start=2, end=3)
    pixels = op.Mul(rows, columns)
    image = op.Transpose(cast(input, compute_type), perm=[0, 3, 1, 2])
    image = op.Reshape(image, _sizes(-1, channels // groups, op.Shape(image, start=2)))
    samples = _grid_sample(image, op.Reshape(grid, _sizes(-1, pixels, K, 2)))
    weights = op.Reshape(op.Transpose(weights, perm=[0, 3, 1, 2, 4]), _sizes(-1, 1, pixels, K))
    summed = op.Reshape(_weighted_sum(samples, weights), _sizes(-1, channels, rows, columns))
    return _cast_back(op.Transpose(summed, perm=[0, 2, 3, 1]), input.dtype, compute_type)


def _tap_positions(
    offset: Any,
    axis: int,
    taps: Sequence[tuple[int, int]],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    kernel_size: Sequence[int],
    offset_scale: float,
    compute_type: Any,
) -> Any:
    """Return the positions of the taps without offsets along an axis, [oh, 1, 1, K] or [ow, 1, K]."""
    op = opset()
    center = dilation[axis] * (kernel_size[axis] - 1) // 2
    relative = [center - padding[axis] + offset_scale * (tap[axis] * dilation[axis] - center) for tap in taps]
    extent = op.Squeeze(op.Shape(offset, start=axis + 1, end=axis + 2), [0])
    zero, one = (op.Constant(value_int=number) for number in (0, 1))
    output = cast(op.Range(zero, extent, one), compute_type) * constant_of(float(stride[axis]), compute_type)
    return op.Unsqueeze(output, [1, 2, 3] if axis == 0 else [1, 2]) + constant_of(np.array(relative), compute_type)


def _compute_type(data: Any) -> Any:
    types = data_types()
    return types.DOUBLE if data.dtype == types.DOUBLE else types.FLOAT


def _sizes(*sizes: Any) -> Any:
    """Return a shape of numbers and vectors."""
    parts = [opset().Constant(value_ints=[size]) if isinstance(size, int) else size for size in sizes]
    return opset().Concat(*parts, axis=0)


def _as_vector(extent: Any) -> Any:
    """Return a number, which is symbolic if the size is dynamic, as a vector of length 1."""
    op = opset()
    return op.Constant(value_ints=[extent]) if isinstance(extent, int) else op.Reshape(extent, [1])


def _to_grid(locations: Any, compute_type: Any) -> Any:
    """Map positions relative to the image from [0, 1] to [-1, 1]. Beyond 4, every position is outside the image."""
    op = opset()
    grid = locations * constant_of(2.0, compute_type) - constant_of(1.0, compute_type)
    return op.Clip(grid, constant_of(-4.0, compute_type), constant_of(4.0, compute_type))


def _grid_sample(image: Any, grid: Any) -> Any:
    from onnxscript import evaluator

    requested = getattr(evaluator.default(), "opset", None)
    # Opset 20 renamed the mode.
    mode = "linear" if requested is not None and requested.version >= 20 else "bilinear"
    return opset().GridSample(image, grid, mode=mode, padding_mode="zeros", align_corners=0)


def _weighted_sum(samples: Any, weights: Any) -> Any:
    """Sum `samples` [heads, channels, queries, K] times `weights` [heads, 1, queries, K] over the last axis."""
    op = opset()
    return op.ReduceSum(op.Mul(samples, weights), [3], keepdims=0)


def _cast_back(output: Any, dtype: Any, compute_type: Any) -> Any:
    return opset().Cast(output, to=int(dtype)) if dtype != compute_type else output
