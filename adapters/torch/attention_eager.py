"""Eager calls of multi-scale deformable attention and deformable aggregation, past the dispatcher; see `eager`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from . import cpu_calls
from .eager import is_plain_gradient


def ms_deform_attn(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor, points: Any
) -> Tensor | None:
    """Compute the operator of tensors that are plain; return None where the operator itself has to be called."""
    call = cpu_calls.attention_call(value, spatial_shapes, sampling_locations, attention_weights, points)
    return None if call is None else _run(call, value, sampling_locations, attention_weights)


def deform_aggregate(input: Tensor, offset: Tensor, mask: Tensor | None, *numbers: Any) -> Tensor | None:
    """Compute the operator of tensors that are plain; return None where the operator itself has to be called."""
    call = cpu_calls.aggregate_call(input, offset, mask, *numbers)
    return None if call is None else _run(call, input, offset, mask)


def _run(call: Any, data: Tensor, sampling: Tensor, weights: Tensor | None) -> Tensor:
    if torch.is_grad_enabled() and (
        data.requires_grad or sampling.requires_grad or (weights is not None and weights.requires_grad)
    ):
        output: Tensor = _Operation.apply(call, data, sampling, weights)
    else:
        output = call.forward(data, sampling, weights)
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
