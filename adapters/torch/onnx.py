"""Export to ONNX: the operations as standard operators, nothing of a domain of our own.

Deformable convolution becomes ``DeformConv`` (ai.onnx, opset 19), deformable RoI pooling ``RoiAlign`` or, with offsets,
a handful of elementwise operators around ``Gather`` and ``MatMul``. Exporting needs `onnxscript`; neither torch nor
dcnops is needed to run the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dcnops._errors import ArgumentError, DcnError, ShapeError

from . import operators

_LOWEST_OPSET = 19
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
    """Export a model with operations of dcnops to ONNX: `torch.onnx.export` that knows them.

    Parameters
    ----------
    model : torch.nn.Module or torch.export.ExportedProgram
        Call ``model.eval()`` first.
    args : tuple of Tensor
        Example inputs.
    f : path, optional
        Where to save the model.
    opset_version : int
        19 or newer. With 22 and newer, onnxruntime 1.32 has no kernel for ``RoiAlign`` on the CPU.
    custom_translation_table : mapping, optional
        Further translations; they win over those of `translation_table`.
    **kwargs
        Handed to `torch.onnx.export`, such as `dynamic_shapes`, `input_names`, `output_names`.

    Returns
    -------
    torch.onnx.ONNXProgram

    Raises
    ------
    ArgumentError
        `opset_version` is too old, or the model pools with offsets and an adaptive number of samples
        (``sampling_ratio=0``). `torch.onnx.export` itself wraps such errors in its own.
    ShapeError
        Channels or the size of a kernel are dynamic.
    torch.onnx.OnnxExporterError
        The model cannot be exported for another reason.

    Notes
    -----
    What the exported operators compute is ONNX's definition, and equals ours for finite data: the offset layout,
    groups, deformable groups, asymmetric padding and the border are the same. It differs, or is open, here:

    - A NaN offset of a convolution makes our sample NaN; onnxruntime (1.32) makes it 0.
    - A NaN or infinite pixel whose weight is zero takes no part in ours; elsewhere it gives NaN.
    - ``DeformConv`` has one type. float16 data beside float32 offsets, and bfloat16 data, are computed in float32 and
      cast back, which is what our operation does inside. All float16 stays float16; onnxruntime has float32
      coordinates and sums there too, which ONNX does not ask for.
    - Regions without offsets, ``RoiAlign``: onnxruntime refuses what is not finite, where ours makes NaN. With
      offsets, the index of a feature map is checked by ``Gather`` only: a negative one counts from the end.
    - Offsets of RoI pooling need ``sampling_ratio > 0``, for memory of the size of
      ``R * P * Q * sampling_ratio**2 * C`` values: for the usual 1000 regions, 7 * 7 bins, 256 channels and
      sampling ratio 2 that is 200 MB.

    onnxruntime runs ``DeformConv`` from 1.25 on; its CPU provider in float16, float32 and float64. onnx's reference
    evaluator samples in float32 and fails for NaN and infinite offsets and for images one pixel high or wide.

    Batch, number of regions, height and width may change from run to run if `dynamic_shapes` names them; channels not.

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
    if opset_version < _LOWEST_OPSET:
        raise _too_old(opset_version)
    try:
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
        reason = _reason(error)
        if reason is None:
            raise
        raise reason from None
    assert program is not None
    return program


def _reason(error: BaseException) -> DcnError | None:
    """The exception of dcnops that the exporter has wrapped in its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, DcnError):
        cause = cause.__cause__
    return cause


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations that `torch.onnx.export` needs, for calls to it other than by `export`.

    Returns
    -------
    dict
        Functions that build ONNX graphs with `onnxscript`, by torch operator. The opset must be 19 or newer.

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
    return {operators.deform_conv2d: _deform_conv2d, operators.deform_roi_pool: _deform_roi_pool}


def _opset() -> Any:
    """The operators. Only a translation may ask: torch's exporter, which calls it, has imported onnxscript then."""
    import onnxscript

    return onnxscript.opset19


def _check_opset() -> None:
    """The exporter would write operators of a newer opset into the model without a word."""
    from onnxscript import evaluator

    asked = getattr(evaluator.default(), "opset", None)
    if asked is not None and asked.version < _LOWEST_OPSET:
        raise _too_old(asked.version)


def _too_old(version: int) -> ArgumentError:
    return ArgumentError(f"opset_version must be at least {_LOWEST_OPSET}, the first with DeformConv, got {version}")


def _types() -> Any:
    import onnx_ir

    return onnx_ir.DataType


def _cast(value: Any, dtype: Any) -> Any:
    return value if value is None or value.dtype == dtype else _opset().Cast(value, to=int(dtype))


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
    _check_opset()
    channels = _fixed("input's channels", input.shape[1])
    per_group, kh, kw = (_fixed("weight", size) for size in weight.shape[1:])
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[1], padding[1])
    one_type = input.dtype != _types().BFLOAT16 and offset.dtype == input.dtype
    real = input.dtype if one_type else _types().FLOAT
    output = _opset().DeformConv(
        *(_cast(value, real) for value in (input, weight, offset, bias, mask)),
        group=channels // per_group,
        offset_group=_fixed("offset's channels", offset.shape[1]) // (2 * kh * kw),
        kernel_shape=[kh, kw],
        strides=list(stride),
        pads=[top, left, bottom, right],
        dilations=list(dilation),
    )
    output.dtype = real
    return _cast(output, input.dtype)


def _fixed(name: str, size: Any) -> int:
    if not isinstance(size, int):
        raise ShapeError(f"{name} must have a fixed size in an ONNX model, got the dynamic size {size}")
    return size


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
    _check_opset()
    op, types = _opset(), _types()
    real = types.DOUBLE if input.dtype == types.DOUBLE else types.FLOAT
    rois = _cast(rois, real)
    if offset is None:
        output = _roi_align(input, rois, real, output_size, spatial_scale, sampling_ratio)
    elif sampling_ratio == 0:
        raise ArgumentError(
            "sampling_ratio must be positive to export deform_roi_pool with offsets to ONNX, got 0: the number of "
            "samples would depend on the region. Export with sampling_ratio=2 (and train with it), or without offsets"
        )
    else:
        output = _sampled_bins(
            input, rois, _cast(offset, real), real, output_size, spatial_scale, sampling_ratio, gamma
        )
    if mask is not None:
        output = op.Mul(output, op.Unsqueeze(_cast(mask, real), [1]))
    return op.Cast(output, to=int(input.dtype)) if input.dtype != real else output


def _roi_align(
    input: Any, rois: Any, real: Any, output_size: Sequence[int], spatial_scale: float, sampling_ratio: int
) -> Any:
    """Output [R, C, P, Q] of type `real`."""
    op = _opset()
    maps, regions = op.Slice(rois, [0], [1], [1]), op.Slice(rois, [1], [5], [1])
    if sampling_ratio == 0:
        # Inverted regions have no samples, as empty ones; onnxruntime fails for them.
        low, high = op.Split(regions, num_outputs=2, axis=1)
        regions = op.Concat(low, op.Max(low, high), axis=1)
    if real == _types().DOUBLE:
        # The attribute has single precision.
        regions, spatial_scale = regions * _constant(spatial_scale, real), 1.0
    return op.RoiAlign(
        _cast(input, real),
        regions,
        _index(op.Squeeze(maps, [1])),
        coordinate_transformation_mode="half_pixel",
        mode="avg",
        output_height=output_size[0],
        output_width=output_size[1],
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


def _sampled_bins(
    input: Any,
    rois: Any,
    offset: Any,
    real: Any,
    output_size: Sequence[int],
    spatial_scale: float,
    samples: int,
    gamma: float,
) -> Any:
    """Output [R, C, P, Q] of type `real`: of the four pixels of a sample, each is gathered for all samples at once."""
    op = _opset()
    P, Q = output_size
    height, width = op.Shape(input, start=2, end=3), op.Shape(input, start=3, end=4)
    maps, x1, y1, x2, y2 = op.Split(op.Unsqueeze(rois, [2, 3]), num_outputs=5, axis=1)
    shift_x, shift_y = op.Split(op.Transpose(offset, perm=[0, 2, 3, 1]), num_outputs=2, axis=3)

    def axis(low: Any, high: Any, shift: Any, bins: Any, extent: Any) -> list[tuple[Any, Any]]:
        """The two neighbours of every sample along one axis: pixels and weights, both [R, P, Q, samples]."""
        zero, half, one = (_constant(value, real) for value in (0.0, 0.5, 1.0))
        scale = _constant(spatial_scale, real)
        start = low * scale - half
        region = (high * scale - half) - start
        length = region / _constant(float(np.size(bins)), real)
        position = (start + _constant(bins, real) * length) + (_constant(gamma, real) * region) * shift
        steps = _constant(np.arange(samples) + 0.5, real)
        at = position + steps * length / _constant(float(samples), real)
        # What is not finite makes NaN as a region, and 0 as an offset.
        at = at + (region - region)
        extent = _cast(extent, real)
        inside = op.And(at >= _constant(-1.0, real), at <= extent)
        share = op.Where(inside, one, op.Where(op.IsNaN(at), at, zero))
        last = extent - one
        clamped = op.Where(inside, op.Min(op.Max(at, zero), last), zero)
        pixel = op.Floor(clamped)
        fraction = clamped - pixel
        return [
            (_index(pixel), share * (one - fraction)),
            (_index(op.Min(pixel + one, last)), share * fraction),
        ]

    rows = axis(y1, y2, shift_y, np.arange(P).reshape(P, 1, 1), height)
    columns = axis(x1, x2, shift_x, np.arange(Q).reshape(Q, 1), width)
    pixels = op.Reshape(op.Transpose(input, perm=[0, 2, 3, 1]), [-1, _fixed("input's channels", input.shape[1])])
    total = None
    for row, row_weight in rows:
        first = (_index(maps) * height + row) * width
        for column, column_weight in columns:
            taken = op.Unsqueeze(first, [4]) + op.Unsqueeze(column, [3])
            weight = op.Unsqueeze(row_weight, [4]) * op.Unsqueeze(column_weight, [3])
            values = op.Gather(pixels, op.Reshape(taken, [-1, P, Q, samples**2]), axis=0)
            part = op.MatMul(op.Reshape(weight, [-1, P, Q, 1, samples**2]), op.Cast(values, to=int(real)))
            total = part if total is None else total + part
    mean = op.Squeeze(total, [3]) / _constant(float(samples**2), real)
    return op.Transpose(mean, perm=[0, 3, 1, 2])


def _constant(values: Any, dtype: Any) -> Any:
    import onnx_ir

    return _opset().Constant(value=onnx_ir.tensor(np.asarray(values, dtype.numpy())))


def _index(value: Any) -> Any:
    return _opset().Cast(value, to=int(_types().INT64))
