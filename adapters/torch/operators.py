"""The operations as operators of `torch.ops.dcnops`: implementations, shapes, gradients.

Each forward and each backward is an operator of its own, so that `torch.compile` and `torch.export` see four opaque
calls. A backward operator returns one tensor per gradient, of size 0 where it was not asked for. Its own gradient, the
double backward, is taken through `differentiable`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dcnops
from dcnops._geometry import DeformConvGeometry, DeformRoIPoolGeometry

from . import differentiable
from .arrays import as_array, as_tensor, on_device_of

_CONV = ("input", "offset", "weight", "bias", "mask")
_ROI_POOL = ("input", "offset", "mask")

_CONV_TENSORS = "Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask"
_CONV_NUMBERS = "int[] stride, int[] padding, int[] dilation, str precision"
_ROI_TENSORS = "Tensor input, Tensor rois, Tensor? offset, Tensor? mask"
_ROI_NUMBERS = "int[] output_size, float spatial_scale, int sampling_ratio, float gamma"

_LIBRARY = torch.library.Library("dcnops", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define(f"deform_conv2d({_CONV_TENSORS}, {_CONV_NUMBERS}) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    f"deform_conv2d_backward(Tensor grad_out, {_CONV_TENSORS}, {_CONV_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(f"deform_roi_pool({_ROI_TENSORS}, {_ROI_NUMBERS}) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    f"deform_roi_pool_backward(Tensor grad_out, {_ROI_TENSORS}, {_ROI_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    tags=_TAGS,
)

deform_conv2d = torch.ops.dcnops.deform_conv2d.default
deform_roi_pool = torch.ops.dcnops.deform_roi_pool.default
_conv_backward = torch.ops.dcnops.deform_conv2d_backward.default
_roi_backward = torch.ops.dcnops.deform_roi_pool_backward.default


def _sides(padding: Sequence[int]) -> Any:
    """Operators know flat lists only: (vertical, horizontal) or (top, bottom, left, right)."""
    return padding if len(padding) == 2 else ((padding[0], padding[1]), (padding[2], padding[3]))


def _needed(names: Sequence[str], needs: Sequence[bool]) -> list[str]:
    return [name for name, need in zip(names, needs) if need]


def _gradients(gradients: Sequence[Any], arguments: Sequence[Tensor | None]) -> list[Tensor]:
    """Each in the memory format of its argument, as most of them are already."""
    return [
        _nothing(arguments) if array is None else _in_format_of(argument, as_tensor(array))
        for array, argument in zip(gradients, arguments)
    ]


def _nothing(arguments: Sequence[Tensor | None]) -> Tensor:
    input = arguments[0]
    assert input is not None
    return input.new_empty(0)


def _in_format_of(like: Tensor | None, images: Tensor) -> Tensor:
    """The images channels-last if `like` is."""
    if like is None or like.ndim != 4 or like.is_contiguous():
        return images
    if not like.is_contiguous(memory_format=torch.channels_last):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _conv_forward_kernel(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], precision: str,
) -> Tensor:  # fmt: skip
    with on_device_of(input):
        output = dcnops.deform_conv2d(
            as_array(input),
            as_array(offset),
            as_array(weight),
            as_array(bias),
            stride,
            _sides(padding),
            dilation,
            as_array(mask),
            precision=precision,
        )
        return _in_format_of(input, as_tensor(output))


def _conv_backward_kernel(
    grad_out: Tensor, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], precision: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with on_device_of(input):
        gradients = dcnops.deform_conv2d_backward(
            as_array(grad_out),
            as_array(input),
            as_array(offset),
            as_array(weight),
            as_array(bias),
            stride,
            _sides(padding),
            dilation,
            as_array(mask),
            needs=_needed(_CONV, needs),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            precision=precision,
        )
        return _gradients(gradients, (input, offset, weight, bias, mask))


def _roi_forward_kernel(
    input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None,
    output_size: list[int], spatial_scale: float, sampling_ratio: int, gamma: float,
) -> Tensor:  # fmt: skip
    with on_device_of(input):
        output = dcnops.deform_roi_pool(
            *map(as_array, (input, rois, offset, mask)),
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
        )  # fmt: skip
        return as_tensor(output)


def _roi_backward_kernel(
    grad_out: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None,
    output_size: list[int], spatial_scale: float, sampling_ratio: int, gamma: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with on_device_of(input):
        gradients = dcnops.deform_roi_pool_backward(
            *map(as_array, (grad_out, input, rois, offset, mask)),
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
            needs=_needed(_ROI_POOL, needs), deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return _gradients(gradients, (input, offset, mask))


def _conv_geometry(*args: Any) -> DeformConvGeometry:
    input, offset, weight, bias, mask, stride, padding, dilation = args[:8]
    return DeformConvGeometry.of(input, offset, weight, bias, mask, stride, _sides(padding), dilation)


def _conv_forward_shape(*args: Any) -> Tensor:
    return _in_format_of(args[0], args[0].new_empty(_conv_geometry(*args).output_shape))


def _conv_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    geometry = _conv_geometry(*args[:-1])
    geometry.check_grad_out(tuple(grad_out.shape))
    return _gradient_shapes(args[:5], args[-1])


def _roi_geometry(input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, *numbers: Any) -> Any:
    return DeformRoIPoolGeometry.of(input, rois, offset, mask, *numbers)


def _roi_forward_shape(*args: Any) -> Tensor:
    output: Tensor = args[0].new_empty(_roi_geometry(*args).output_shape)
    return output


def _roi_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    geometry = _roi_geometry(*args[:-1])
    geometry.check_grad_out(tuple(grad_out.shape))
    return _gradient_shapes((args[0], args[2], args[3]), args[-1])


def _gradient_shapes(arguments: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        _nothing(arguments)
        if argument is None or not need
        else _in_format_of(argument, argument.new_empty(argument.shape))
        for argument, need in zip(arguments, needs)
    ]


def _save(ctx: Any, tensors: Sequence[Tensor | None], numbers: Sequence[Any]) -> None:
    ctx.save_for_backward(*tensors)
    ctx.numbers = numbers


def _save_conv(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[:5], inputs[5:])


def _conv_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = _conv_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    return (*_wanted(gradients, needs), None, None, None, None)


def _save_conv_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:6], inputs[6:])


def _conv_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    stride, padding, dilation, _, needs = ctx.numbers
    numbers: tuple[Any, ...] = (stride, _sides(padding), dilation)
    second = _second_gradients(
        lambda _, *tensors: differentiable.deform_conv2d(*tensors, *numbers),
        ctx.saved_tensors, range(1, 6), needs, gradients, ctx.needs_input_grad,
    )  # fmt: skip
    return (*second, None, None, None, None, None)


def _save_roi(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _save(ctx, inputs[:4], inputs[4:])


def _roi_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 2, 3)]
    gradients = _roi_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    input, offset, mask = _wanted(gradients, needs)
    return (input, None, offset, mask, None, None, None, None)


def _save_roi_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs[:5], inputs[5:])


def _roi_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *numbers, needs = ctx.numbers
    second = _second_gradients(
        lambda _, *tensors: differentiable.deform_roi_pool(*tensors, *numbers),
        ctx.saved_tensors, (1, 3, 4), needs, gradients, ctx.needs_input_grad,
    )  # fmt: skip
    return (*second, None, None, None, None, None)


def _wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs)]


def _second_gradients(
    operation: Callable[..., Tensor],
    saved: Sequence[Tensor | None],
    first_order: Sequence[int],
    needs: Sequence[bool],
    gradients: Sequence[Tensor],
    needs_input_grad: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of sum <gradients[i], first gradient i> with respect to `saved`, which begins with grad_out."""
    with torch.enable_grad():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(i == 0 or i in first_order)
            for i, tensor in enumerate(saved)
        ]
        wanted = [(leaves[i], gradient) for i, gradient, need in zip(first_order, gradients, needs) if need]
        variables = [leaf for leaf, _ in wanted if leaf is not None]
        first = torch.autograd.grad(operation(*leaves), variables, leaves[0], create_graph=True)
    targets = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and needs_input_grad[i]}
    second = torch.autograd.grad(first, list(targets.values()), [gradient for _, gradient in wanted], allow_unused=True)
    return [dict(zip(targets, second)).get(i) for i in range(len(saved))]


for _name, _kernel, _fake in (
    ("deform_conv2d", _conv_forward_kernel, _conv_forward_shape),
    ("deform_conv2d_backward", _conv_backward_kernel, _conv_backward_shape),
    ("deform_roi_pool", _roi_forward_kernel, _roi_forward_shape),
    ("deform_roi_pool_backward", _roi_backward_kernel, _roi_backward_shape),
):
    for _device in ("CPU", "CUDA"):
        torch.library.impl(f"dcnops::{_name}", _device, _kernel, lib=_LIBRARY)
    torch.library.register_fake(f"dcnops::{_name}", _fake, lib=_LIBRARY)

for _name, _gradient, _setup in (
    ("deform_conv2d", _conv_gradient, _save_conv),
    ("deform_conv2d_backward", _conv_double_gradient, _save_conv_backward),
    ("deform_roi_pool", _roi_gradient, _save_roi),
    ("deform_roi_pool_backward", _roi_double_gradient, _save_roi_backward),
):
    torch.library.register_autograd(f"dcnops::{_name}", _gradient, setup_context=_setup, lib=_LIBRARY)
