"""Export to ONNX with standard operators only.

Deformable convolution becomes ``DeformConv`` (ai.onnx, opset 19). Deformable RoI pooling becomes ``RoiAlign`` or, with
offsets, elementwise operators around ``Gather`` and ``MatMul``. Multi-scale deformable attention and deformable
aggregation become ``GridSample``. Export needs `onnxscript`; running the exported model
needs neither torch nor dcnops.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dcnops._errors import ArgumentError, DcnError

from .. import name_extra
from . import attention_operators, onnx_attention, operators
from .onnx_nodes import (
    LOWEST_OPSET,
    cast,
    check_opset,
    constant_of,
    data_types,
    fixed_size,
    opset,
    opset_error,
    to_index,
)

_DEFAULT_OPSET = 20


def export(
    model: torch.nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    *,
    opset_version: int = _DEFAULT_OPSET,
    custom_translation_table: Mapping[Callable[..., Any], Callable[..., Any]] | None = None,
    **kwargs: Any,
) -> torch.onnx.ONNXProgram:
    """Export a model to ONNX: `torch.onnx.export` with translations for the operations of dcnops.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        Call ``model.eval()`` first.
    args : tuple of Tensor
        Example inputs.
    f : path, optional
        File to save the model to.
    opset_version : int
        19 or newer. From opset 22 on, onnxruntime 1.32 has no CPU kernel for ``RoiAlign``.
    custom_translation_table : mapping, optional
        Further translations. They take precedence over those of `translation_table`.
    **kwargs
        Passed to `torch.onnx.export`, such as `dynamic_shapes`, `input_names`, `output_names`.

    Returns
    -------
    torch.onnx.ONNXProgram

    Raises
    ------
    ArgumentError
        `opset_version` is too old, or the model pools with offsets and an adaptive number of samples
        (``sampling_ratio=0``).
    ShapeError
        The number of channels or the size of a kernel is dynamic.
    torch.onnx.OnnxExporterError
        The model cannot be exported for another reason.

    Notes
    -----
    For finite data, ONNX defines the same results as dcnops: the order of offset channels, groups, deformable groups,
    asymmetric padding and the border rule are the same. These cases differ:

    - A NaN offset of a convolution makes a sample NaN in dcnops and 0 in onnxruntime (1.32).
    - A NaN or infinite pixel with weight zero is ignored in dcnops and gives NaN elsewhere.
    - All inputs of ``DeformConv`` have one dtype. float16 data with float32 offsets, and bfloat16 data, are computed in
      float32 and cast back, as dcnops does internally. A convolution with only float16 tensors stays float16;
      onnxruntime uses float32 coordinates and sums for it, which ONNX does not require.
    - ``RoiAlign`` (regions without offsets) in onnxruntime rejects regions that are not finite; dcnops returns NaN.
      With offsets, only ``Gather`` checks the index of a feature map: a negative index counts from the end.
    - ``GridSample`` takes positions relative to the size of a map, which costs a few rounding errors of float32. 16-bit
      data are computed in float32 and cast back. A NaN location gives an undefined result, and a NaN or infinite pixel
      with weight zero gives NaN. Below opset 20, onnxruntime 1.32 has no CPU kernel for float64.
    - RoI pooling with offsets needs ``sampling_ratio > 0`` and memory for ``R * P * Q * sampling_ratio**2 * C`` values:
      200 MB for 1000 regions, 7 * 7 bins, 256 channels and sampling ratio 2.

    onnxruntime supports ``DeformConv`` from 1.25 on, its CPU provider in float16, float32 and float64. The reference
    evaluator of onnx samples in float32 and fails for NaN and infinite offsets and for images one pixel high or wide.

    Batch size, number of regions, height and width may change from run to run if `dynamic_shapes` names them. Channels
    are fixed.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import deform_conv2d, onnx
    >>> class Layer(torch.nn.Module):
    ...     def forward(self, x, offset, weight):
    ...         return deform_conv2d(x, offset, weight, padding=1)
    >>> inputs = torch.rand(2, 4, 8, 8), torch.zeros(2, 18, 8, 8), torch.rand(6, 4, 3, 3)
    >>> program = onnx.export(Layer().eval(), inputs, verbose=False)
    >>> [node.op_type for node in program.model.graph]
    ['DeformConv']
    """
    if opset_version < LOWEST_OPSET:
        raise opset_error(opset_version)
    try:
        with name_extra("onnx", "onnx", "onnxscript", "onnx_ir"):
            program = torch.onnx.export(
                model,
                args,
                f,
                dynamo=True,
                opset_version=opset_version,
                custom_translation_table={**translation_table(), **(custom_translation_table or {})},
                **kwargs,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = _dcnops_cause(error)
        if cause is None:
            raise
        raise cause from None
    assert program is not None
    return program


def _dcnops_cause(error: BaseException) -> DcnError | None:
    """Return the exception of dcnops that the exporter has wrapped, if any."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DcnError):
        cause = cause.__cause__
    return cause


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the translations of the operations, for direct calls to `torch.onnx.export`.

    Returns
    -------
    dict
        Functions that build ONNX graphs with `onnxscript`, by torch operator. They need opset 19 or newer, and
        `torch.onnx.export` wraps their exceptions in its own.

    Examples
    --------
    >>> import torch
    >>> from dcnops.adapters.torch import deform_roi_pool, onnx
    >>> class Pool(torch.nn.Module):
    ...     def forward(self, x, rois):
    ...         return deform_roi_pool(x, rois, output_size=7, spatial_scale=1 / 16)
    >>> inputs = torch.rand(2, 4, 8, 8), torch.tensor([[0.0, 8, 8, 80, 96]])
    >>> table = onnx.translation_table()
    >>> program = torch.onnx.export(
    ...     Pool().eval(), inputs, dynamo=True, opset_version=19, custom_translation_table=table, verbose=False
    ... )
    >>> "RoiAlign" in [node.op_type for node in program.model.graph]
    True
    """
    return {
        operators.deform_conv2d: _deform_conv2d,
        operators.deform_roi_pool: _deform_roi_pool,
        attention_operators.ms_deform_attn: onnx_attention.ms_deform_attn,
        attention_operators.deform_aggregate: onnx_attention.deform_aggregate,
    }


def _deform_conv2d(
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any,
    mask: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    precision: str,
) -> Any:
    check_opset()
    channels = fixed_size("input's channels", input.shape[1])
    channels_per_group, kh, kw = (fixed_size("weight", size) for size in weight.shape[1:])
    top, bottom, left, right = padding
    one_dtype = input.dtype != data_types().BFLOAT16 and offset.dtype == input.dtype
    compute_type = input.dtype if one_dtype else data_types().FLOAT
    output = opset().DeformConv(
        *(cast(value, compute_type) for value in (input, weight, offset, bias, mask)),
        group=channels // channels_per_group,
        offset_group=fixed_size("offset's channels", offset.shape[1]) // (2 * kh * kw),
        kernel_shape=[kh, kw],
        strides=list(stride),
        pads=[top, left, bottom, right],
        dilations=list(dilation),
    )
    output.dtype = compute_type
    return cast(output, input.dtype)


def _deform_roi_pool(
    input: Any,
    rois: Any,
    offset: Any,
    mask: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Any:
    check_opset()
    op, types = opset(), data_types()
    compute_type = types.DOUBLE if input.dtype == types.DOUBLE else types.FLOAT
    rois = cast(rois, compute_type)
    if offset is None:
        output = _roi_align(input, rois, compute_type, output_size, spatial_scale, sampling_ratio)
    elif sampling_ratio == 0:
        raise ArgumentError(
            "sampling_ratio must be positive to export deform_roi_pool with offsets to ONNX, got 0: the number of "
            "samples would depend on the region. Export with sampling_ratio=2 (and train with it), or without offsets"
        )
    else:
        offset = cast(offset, compute_type)
        output = _pool_samples(input, rois, offset, compute_type, output_size, spatial_scale, sampling_ratio, gamma)
    if mask is not None:
        output = op.Mul(output, op.Unsqueeze(cast(mask, compute_type), [1]))
    return op.Cast(output, to=int(input.dtype)) if input.dtype != compute_type else output


def _roi_align(
    input: Any, rois: Any, compute_type: Any, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Any:
    """Return the output [R, C, P, Q] in `compute_type`."""
    op = opset()
    maps, regions = op.Slice(rois, [0], [1], [1]), op.Slice(rois, [1], [5], [1])
    if sampling_ratio == 0:
        # Inverted regions have no samples, like empty regions. onnxruntime fails for them.
        low, high = op.Split(regions, num_outputs=2, axis=1)
        regions = op.Concat(low, op.Max(low, high), axis=1)
    if compute_type == data_types().DOUBLE:
        # The attribute spatial_scale of RoiAlign has single precision.
        regions, spatial_scale = regions * constant_of(spatial_scale, compute_type), 1.0
    return op.RoiAlign(
        cast(input, compute_type),
        regions,
        to_index(op.Squeeze(maps, [1])),
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


def _pool_samples(
    input: Any,
    rois: Any,
    offset: Any,
    compute_type: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    samples: int,
    gamma: float,
) -> Any:
    """Return the output [R, C, P, Q] in `compute_type`.

    Each of the four pixels around a sample is gathered for all samples at once.
    """
    op = opset()
    P, Q = output_size
    height, width = op.Shape(input, start=2, end=3), op.Shape(input, start=3, end=4)
    maps, x1, y1, x2, y2 = op.Split(op.Unsqueeze(rois, [2, 3]), num_outputs=5, axis=1)
    shift_x, shift_y = op.Split(op.Transpose(offset, perm=[0, 2, 3, 1]), num_outputs=2, axis=3)
    numbers = (samples, spatial_scale, gamma, compute_type)
    rows = _axis_neighbours(y1, y2, shift_y, np.arange(P).reshape(P, 1, 1), height, *numbers)
    columns = _axis_neighbours(x1, x2, shift_x, np.arange(Q).reshape(Q, 1), width, *numbers)
    channels = fixed_size("input's channels", input.shape[1])
    pixels = op.Reshape(op.Transpose(input, perm=[0, 2, 3, 1]), [-1, channels])
    total = None
    for row, row_weight in rows:
        row_start = (to_index(maps) * height + row) * width
        for column, column_weight in columns:
            index = op.Unsqueeze(row_start, [4]) + op.Unsqueeze(column, [3])
            weight = op.Unsqueeze(row_weight, [4]) * op.Unsqueeze(column_weight, [3])
            values = op.Gather(pixels, op.Reshape(index, [-1, P, Q, samples**2]), axis=0)
            part = op.MatMul(op.Reshape(weight, [-1, P, Q, 1, samples**2]), op.Cast(values, to=int(compute_type)))
            total = part if total is None else total + part
    mean = op.Squeeze(total, [3]) / constant_of(float(samples**2), compute_type)
    return op.Transpose(mean, perm=[0, 3, 1, 2])


def _axis_neighbours(
    low: Any,
    high: Any,
    shift: Any,
    bins: Any,
    extent: Any,
    samples: int,
    spatial_scale: float,
    gamma: float,
    compute_type: Any,
) -> list[tuple[Any, Any]]:
    """Return pixel index and weight, both [R, P, Q, samples], of a sample's two neighbours along one axis.

    The regions reach from `low` to `high`, `shift` holds the offsets, and `extent` is the size of the image.
    """
    op, constant = opset(), partial(constant_of, dtype=compute_type)
    zero, half, one = constant(0.0), constant(0.5), constant(1.0)
    start = low * constant(spatial_scale) - half
    region = (high * constant(spatial_scale) - half) - start
    length = region / constant(float(np.size(bins)))
    displacement = op.Where(op.IsInf(shift), shift, (constant(gamma) * region) * shift)
    position = (start + constant(bins) * length) + displacement
    position = position + constant(np.arange(samples) + 0.5) * length / constant(float(samples))
    # region - region is NaN for an infinite region: such a region gives NaN, an infinite offset gives 0.
    position = position + (region - region)
    extent = cast(extent, compute_type)
    inside = op.And(position >= constant(-1.0), position <= extent)
    factor = op.Where(inside, one, op.Where(op.IsNaN(position), position, zero))
    last = extent - one
    clamped = op.Where(inside, op.Min(op.Max(position, zero), last), zero)
    pixel = op.Floor(clamped)
    fraction = clamped - pixel
    return [
        (to_index(pixel), factor * (one - fraction)),
        (to_index(op.Min(pixel + one, last)), factor * fraction),
    ]
