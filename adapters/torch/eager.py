"""Eager calls on plain tensors, past the dispatcher: an `autograd.Function` calls the backend.

On CUDA tensors, it issues recorded programs.

All other calls go through the registered operator: compilation, export, tracing, tensor subclasses, functorch, dispatch
and function modes, forward-mode derivatives, calls under the profiler, which only sees operators, and calls that are
explained in the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from dcnops._backends.cuda.workspace import get_workspace
from dcnops._explain import is_explaining
from dcnops._shapes import DeformConvGeometry

from . import cpu_calls, cuda_roi_calls, devices, operators
from .cuda_calls import CALLS, ConvCall, can_be_prepared
from .cuda_roi_calls import ROI_CALLS, RoICall

_ALIGNMENT_MASK = 15

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_tracing = torch._C._get_tracing_state
_is_profiling = torch._C._autograd._profiler_enabled


def is_plain(required: tuple[Any, ...], optional: tuple[Any, ...]) -> bool:
    """Check for plain tensors, and that no mode is active that has to see the operator."""
    # Loops, because calls are what costs most here.
    for tensor in required:
        if tensor is None:
            return False
    for tensor in (*required, *optional):
        kind = type(tensor)
        if kind is Tensor or kind is Parameter:
            # Views such as ``x.conj().imag``, and what is detached from them, are stored with the opposite sign.
            if tensor.is_neg():
                return False
        elif tensor is not None:
            return False
    return (
        _dispatch_modes() == 0
        and (_function_modes() == 0 or _is_default_device_all())
        and _functorch_level() is None
        and forward_ad._current_level < 0
        and _jit_tracing() is None
        and not _is_profiling()
        and not is_explaining()
    )


def _is_default_device_all() -> bool:
    """Check for function modes that only choose the device of new tensors, such as ``with torch.device("cuda")``."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_plain_gradient(grad_out: Tensor) -> bool:
    return (grad_out.is_cpu or devices.is_on_current_gpu(grad_out)) and is_plain((grad_out,), ())


def deform_conv2d(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    precision: str,
) -> Tensor | None:
    """Compute the operator of tensors that are `is_plain`; return None where the operator itself has to be called."""
    tensors = input, offset, weight, bias, mask
    numbers = stride, padding, dilation, precision
    call: Any
    if not devices.is_on_current_gpu(input):
        call = cpu_calls.conv_call(*tensors, *numbers)
    else:
        try:
            # With the text of the numbers, because 1.0 and True equal 1 but are errors.
            key = (
                input.shape, input.stride(), input.dtype, input.device,
                offset.shape, offset.stride(), offset.dtype, offset.device,
                weight.shape, weight.stride(), weight.dtype, weight.device,
                bias is not None and (bias.shape, bias.stride(), bias.dtype, bias.device),
                mask is not None and (mask.shape, mask.stride(), mask.dtype, mask.device),
                numbers, f"{stride} {padding} {dilation}", get_workspace(),
            )  # fmt: skip
            call = CALLS.get(key) or _prepare_conv_call(key, tensors, numbers)
        except (TypeError, ValueError):  # a list has no hash, an endless number no text
            call = None
        if call is not None and call.copied:
            input, offset, weight, bias, mask = tensors = tuple(  # type: ignore[assignment]
                tensor.contiguous() if i in call.copied and tensor is not None else tensor
                for i, tensor in enumerate(tensors)
            )
        if call is None or (input.data_ptr() | weight.data_ptr()) & _ALIGNMENT_MASK:
            rounds = weight.dtype is not input.dtype and can_be_prepared(*tensors)
            geometry = DeformConvGeometry.of(*tensors, stride, padding, dilation) if rounds else None
            call = None if geometry is None else _RoundingCall(geometry, precision)
    if call is None:
        return None
    if torch.is_grad_enabled() and (
        input.requires_grad
        or offset.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (mask is not None and mask.requires_grad)
    ):
        output: Tensor = _DeformConv2d.apply(call, input, offset, weight, bias, mask)
    else:
        output = call.forward(input, offset, weight, bias, mask)
    return output


def _prepare_conv_call(key: Any, tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> ConvCall | None:
    call = None
    if can_be_prepared(*tensors):
        call = CALLS.add(key, lambda: ConvCall(tensors, *numbers))
        if call is None:
            CALLS.see(key)
    return call


class _RoundingCall(cpu_calls.ConvCall):
    """Call of the operator with rounded float32 weights.

    The float32 weights are saved for the backward pass, as by a replay: a checkpoint may be followed by either.
    """

    __slots__ = ()

    def forward(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the output."""
        output: Tensor = operators.deform_conv2d(input, offset, weight.to(input.dtype), bias, mask, *self.numbers)
        return output

    def backward(self, grad_out: Tensor, tensors: Sequence[Any], needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Return the gradients that are needed; None for the others."""
        return _operator_gradients(self.numbers, grad_out, tensors, needs)


def _operator_gradients(
    numbers: tuple[Any, ...], grad_out: Tensor, tensors: Sequence[Any], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """Return the gradients from the operator, which takes weights in the dtype of the input."""
    input, offset, weight, *others = tensors
    rounded = weight.to(input.dtype)
    first, second, grad_weight, *rest = operators.deform_conv2d_backward(
        grad_out, input, offset, rounded, *others, *numbers, list(needs)
    )
    gradients = first, second, grad_weight.to(weight.dtype), *rest
    return operators.none_unless_needed(gradients, needs)


class _DeformConv2d(Function):
    @staticmethod
    def forward(ctx: Any, call: ConvCall | cpu_calls.ConvCall, *tensors: Any) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        return call.forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not is_plain_gradient(grad_out):
            # The operator has a gradient of its own.
            return (None, *_operator_gradients(call.numbers, grad_out, tensors, needs))
        return (None, *call.backward(grad_out, tensors, needs))


def deform_roi_pool(
    input: Tensor,
    rois: Tensor,
    offset: Tensor | None,
    mask: Tensor | None,
    output_size: Any,
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
) -> Tensor | None:
    """Compute the operator of tensors that are `is_plain`; return None where the operator itself has to be called."""
    if not devices.is_on_current_gpu(input):
        numbers = output_size, spatial_scale, sampling_ratio, gamma
        cpu_call = cpu_calls.roi_call(input, rois, offset, mask, *numbers)
        return None if cpu_call is None else _pool(cpu_call, input, rois, offset, mask)
    # The first axis of all tensors but `input` is the number of regions, which may change from call to call.
    try:
        key = (
            input.shape, input.stride(), input.dtype, input.device,
            rois.shape[1:], rois.dtype, rois.device,
            offset is not None and (offset.shape[1:], offset.dtype, offset.device),
            mask is not None and (mask.shape[1:], mask.dtype, mask.device),
            tuple(output_size) if type(output_size) is list else output_size, spatial_scale, sampling_ratio, gamma,
            f"{output_size} {spatial_scale} {sampling_ratio} {gamma}",
        )  # fmt: skip
        call = ROI_CALLS.get(key)
    except (TypeError, ValueError):  # not numbers, or endless ones
        return None
    if call is None:
        call = _prepare_roi_call(key, input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma)
        if call is None:
            return None
    input = input.contiguous(memory_format=call.memory_format)
    if input.data_ptr() & _ALIGNMENT_MASK:
        return None
    if offset is not None:
        if offset.shape[0] != rois.shape[0]:
            return None
        offset = offset.contiguous()
    if mask is not None:
        if mask.shape[0] != rois.shape[0]:
            return None
        mask = mask.contiguous()
    return _pool(call, input, rois, offset, mask)


def _pool(
    call: RoICall | cpu_calls.RoICall, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None
) -> Tensor:
    if torch.is_grad_enabled() and (
        input.requires_grad
        or rois.requires_grad
        or (offset is not None and offset.requires_grad)
        or (mask is not None and mask.requires_grad)
    ):
        output: Tensor = _DeformRoIPool.apply(call, input, rois, offset, mask)
        return output
    return call.forward(input, rois, offset, mask)


def _prepare_roi_call(key: Any, *arguments: Any) -> RoICall | None:
    call = None
    if cuda_roi_calls.can_be_prepared(*arguments[:4]):
        call = ROI_CALLS.add(key, lambda: RoICall(*arguments))
        if call is None:
            ROI_CALLS.see(key)
    return call


class _DeformRoIPool(Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: RoICall | cpu_calls.RoICall,
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(input, rois, offset, mask)
        ctx.call = call
        return call.forward(input, rois, offset, mask)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        call, tensors = ctx.call, ctx.saved_tensors
        _, input, _, offset, mask = ctx.needs_input_grad
        needs = (input, offset, mask)
        if torch.is_grad_enabled() or not (is_plain_gradient(grad_out) and call.has_backward(needs)):
            # The operator can be differentiated again, and can be deterministic.
            gradients = operators.deform_roi_pool_backward(grad_out, *tensors, *call.numbers, list(needs))
            input, offset, mask = operators.none_unless_needed(gradients, needs)
        else:
            input, offset, mask = call.backward(grad_out, tensors, needs)
        return None, input, None, offset, mask
