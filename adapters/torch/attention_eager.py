"""Eager calls of multi-scale deformable attention and deformable aggregation, past the dispatcher; see `eager`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda.kernel_constants import VECTOR_BYTES

from . import cpu_calls, cuda_attention_calls, devices
from .eager import is_plain_gradient

_WRITTEN_OUT = {type(None), bool, int, float, list, tuple, torch.Size}
"""Types with a text that has all numbers, unlike that of an iterator."""


def ms_deform_attn(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor, points: Any
) -> Tensor | None:
    """Compute the operator of tensors that are plain; return None where the operator itself has to be called."""
    if not devices.is_on_current_gpu(value):
        call = cpu_calls.attention_call(value, spatial_shapes, sampling_locations, attention_weights, points)
        return None if call is None else _run(call, value, sampling_locations, attention_weights)
    on_device = None
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.device == value.device:
            on_device = spatial_shapes
        else:
            spatial_shapes = spatial_shapes.tolist()

    def geometry() -> MSDeformAttnGeometry:
        arrays = (value, spatial_shapes, sampling_locations, attention_weights)
        return MSDeformAttnGeometry.of(*arrays, points, on_device is not None)

    tensors = (value, on_device, sampling_locations, attention_weights)
    shapes = () if on_device is not None else spatial_shapes
    if type(shapes) not in (list, tuple):
        return None
    return _run_prepared(cuda_attention_calls.AttentionCall, (*shapes, points), geometry, tensors)


def deform_aggregate(input: Tensor, offset: Tensor, mask: Tensor | None, *numbers: Any) -> Tensor | None:
    """Compute the operator of tensors that are plain; return None where the operator itself has to be called."""
    if not devices.is_on_current_gpu(input):
        call = cpu_calls.aggregate_call(input, offset, mask, *numbers)
        return None if call is None else _run(call, input, offset, mask)

    def geometry() -> DeformAggregateGeometry:
        return DeformAggregateGeometry.of(input, offset, mask, *numbers)

    return _run_prepared(cuda_attention_calls.AggregateCall, numbers, geometry, (input, offset, mask))


def _run_prepared(
    kind: Any, numbers: tuple[Any, ...], geometry: Callable[[], Any], tensors: tuple[Tensor | None, ...]
) -> Tensor | None:
    if not {*map(type, numbers)} <= _WRITTEN_OUT:
        return None
    try:
        key = str(numbers)  # because 1.0 and True equal 1 but are errors
    except ValueError:  # an endless number has no text
        return None
    call = cuda_attention_calls.prepared_call(kind, key, geometry, tensors)
    if call is None:
        return None
    contiguous = [None if tensor is None else tensor.contiguous() for tensor in tensors]
    data = contiguous[0]
    if data is None or data.data_ptr() % VECTOR_BYTES:
        return None
    return _run(call, *contiguous)


def _run(call: Any, *tensors: Tensor | None) -> Tensor:
    output: Tensor
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        output = _Operation.apply(call, *tensors)
    else:
        output = call.forward(*tensors)
    return output


class _Operation(Function):
    @staticmethod
    def forward(ctx: Any, call: Any, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        output: Tensor = call.forward(*tensors)
        return output

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        call, needs = ctx.call, ctx.needs_input_grad[1:]
        is_plain = not torch.is_grad_enabled() and is_plain_gradient(grad_out)
        compute = call.backward if is_plain else call.operator_backward
        return (None, *compute(grad_out, ctx.saved_tensors, needs))
