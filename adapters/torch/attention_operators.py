"""The operators of multi-scale deformable attention and deformable aggregation; see `operators`.

Operator schemas allow only flat lists. `shapes` is [h, w, h, w, ...], or empty if `spatial_shapes` is a tensor.
`points` has a number for each level, or is empty for the argument None. `is_flat` is True if that argument is a
sequence, and levels and points share an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import dcnops
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._errors import ShapeError

from . import differentiable
from .arrays import as_array, as_tensor
from .devices import on_device_of
from .operators import (
    as_arrays,
    has_symbols,
    implement,
    implementation_library,
    needed_names,
    none_unless_needed,
    second_gradients,
)

ms_deform_attn = torch.ops.dcnops.ms_deform_attn.default
ms_deform_attn_backward = torch.ops.dcnops.ms_deform_attn_backward.default
deform_aggregate = torch.ops.dcnops.deform_aggregate.default
deform_aggregate_backward = torch.ops.dcnops.deform_aggregate_backward.default

_AGGREGATE_NUMBERS = ("groups", "kernel_size", "stride", "padding", "dilation", "offset_scale", "remove_center")


def _shapes(spatial_shapes: Tensor | None, shapes: Sequence[int]) -> Any:
    """Return the argument of the array functions: numbers on the host, or an array on the device."""
    if spatial_shapes is None:
        return list(zip(shapes[::2], shapes[1::2]))
    return spatial_shapes.tolist() if spatial_shapes.device.type == "cpu" else as_array(spatial_shapes)


def _points(points: Sequence[int], is_flat: bool) -> Any:
    """Return the argument of the array functions."""
    if not points:
        return None
    return list(points) if is_flat else points[0]


def _gradients(arrays: Sequence[Any], like: Tensor) -> list[Tensor]:
    return [like.new_empty(0) if array is None else as_tensor(array) for array in arrays]


# Implementations


def _attn_kernel(
    value: Tensor, spatial_shapes: Tensor | None, sampling_locations: Tensor, attention_weights: Tensor,
    shapes: list[int], points: list[int], is_flat: bool,
) -> Tensor:  # fmt: skip
    with on_device_of(value):
        output = dcnops.ms_deform_attn(
            spatial_shapes=_shapes(spatial_shapes, shapes), points=_points(points, is_flat),
            **as_arrays(value=value, sampling_locations=sampling_locations, attention_weights=attention_weights),
        )  # fmt: skip
        return as_tensor(output)


def _attn_backward_kernel(
    grad_out: Tensor, value: Tensor, spatial_shapes: Tensor | None, sampling_locations: Tensor,
    attention_weights: Tensor, shapes: list[int], points: list[int], is_flat: bool, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    tensors = {"value": value, "sampling_locations": sampling_locations, "attention_weights": attention_weights}
    with on_device_of(value):
        gradients = dcnops.ms_deform_attn_backward(
            spatial_shapes=_shapes(spatial_shapes, shapes), points=_points(points, is_flat),
            **as_arrays(grad_out=grad_out, **tensors), needs=needed_names(needs, *tensors),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return _gradients(gradients, value)


def _aggregate_kernel(input: Tensor, offset: Tensor, mask: Tensor | None, *numbers: Any) -> Tensor:
    with on_device_of(input):
        arrays = as_arrays(input=input, offset=offset, mask=mask)
        return as_tensor(dcnops.deform_aggregate(**arrays, **dict(zip(_AGGREGATE_NUMBERS, numbers))))


def _aggregate_backward_kernel(
    grad_out: Tensor, input: Tensor, offset: Tensor, mask: Tensor | None, *numbers: Any
) -> list[Tensor]:
    *parameters, needs = numbers
    with on_device_of(input):
        gradients = dcnops.deform_aggregate_backward(
            **as_arrays(grad_out=grad_out, input=input, offset=offset, mask=mask),
            **dict(zip(_AGGREGATE_NUMBERS, parameters)), needs=needed_names(needs, "input", "offset", "mask"),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return _gradients(gradients, input)


def aggregate_numbers(geometry: DeformAggregateGeometry) -> tuple[Any, ...]:
    """Return the arguments of the operator after its tensors."""
    g = geometry
    return g.G, [g.kh, g.kw], [g.sh, g.sw], [g.ph, g.pw], [g.dh, g.dw], g.offset_scale, g.remove_center


# Output shapes, for tracing. Symbolic sizes are checked when the operator runs, see `operators`.


def attn_geometry(
    value: Tensor,
    spatial_shapes: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    shapes: Sequence[int],
    points: Sequence[int],
    is_flat: bool,
) -> MSDeformAttnGeometry:
    """Return the sizes of a call of the operator, without looking into a tensor `spatial_shapes`."""
    numbers = _shapes(None, shapes) if spatial_shapes is None else spatial_shapes
    arrays = (value, numbers, sampling_locations, attention_weights)
    return MSDeformAttnGeometry.of(*arrays, _points(points, is_flat), spatial_shapes is not None)


def _check_ranks(ranks: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (tensor, legal) in ranks.items():
        if tensor.ndim not in legal:
            raise ShapeError(f"{name} must have {' or '.join(map(str, legal))} dimensions, got {tensor.ndim}")


def _attn_shape(*args: Any, grad_out: Tensor | None = None) -> Tensor:
    value, sampling_locations = args[0], args[2]
    if has_symbols(grad_out, *args):
        _check_ranks({"value": (value, (4,)), "sampling_locations": (sampling_locations, (5, 6))})
    else:
        geometry = attn_geometry(*args)
        if grad_out is not None:
            geometry.check_grad_out(tuple(grad_out.shape))
    N, _, M, D = value.shape
    output: Tensor = value.new_empty((N, sampling_locations.shape[1], M * D))
    return output


def _attn_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    _attn_shape(*args[:-1], grad_out=grad_out)
    return _gradient_shapes((args[0], args[2], args[3]), args[-1])


def _aggregate_shape(*args: Any, grad_out: Tensor | None = None) -> Tensor:
    input, offset = args[:2]
    if has_symbols(grad_out, *args):
        _check_ranks({"input": (input, (4,)), "offset": (offset, (4,))})
    else:
        geometry = DeformAggregateGeometry.of(*args)
        if grad_out is not None:
            geometry.check_grad_out(tuple(grad_out.shape))
    output: Tensor = input.new_empty((input.shape[0], *offset.shape[1:3], input.shape[3]))
    return output


def _aggregate_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    _aggregate_shape(*args[:-1], grad_out=grad_out)
    return _gradient_shapes(args[:3], args[-1])


def _gradient_shapes(arguments: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    first = arguments[0]
    assert first is not None
    return [
        first.new_empty(0) if argument is None or not need else argument.new_empty(argument.shape)
        for argument, need in zip(arguments, needs)
    ]


# Gradients


def _attn_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 2, 3)]
    gradients = ms_deform_attn_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    value, locations, weights = none_unless_needed(gradients, needs)
    return value, None, locations, weights, None, None, None


def _attn_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *numbers, needs = ctx.numbers

    def forward(*tensors: Any) -> Tensor:
        return differentiable.ms_deform_attn(attn_geometry(*tensors, *numbers), *tensors)

    return (*second_gradients(ctx, forward, (1, 3, 4), needs, gradients), *[None] * len(ctx.numbers))


def _aggregate_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    gradients = deform_aggregate_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    return (*none_unless_needed(gradients, needs), *[None] * len(_AGGREGATE_NUMBERS))


def _aggregate_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *numbers, needs = ctx.numbers

    def forward(*tensors: Any) -> Tensor:
        return differentiable.deform_aggregate(DeformAggregateGeometry.of(*tensors, *numbers), *tensors)

    return (*second_gradients(ctx, forward, range(1, 4), needs, gradients), *[None] * len(ctx.numbers))


_LIBRARY = implementation_library("_attention_implementations")
for _name, _kernel, _shape, _gradient, _tensors in (
    ("ms_deform_attn", _attn_kernel, _attn_shape, _attn_gradient, 4),
    ("ms_deform_attn_backward", _attn_backward_kernel, _attn_backward_shape, _attn_double_gradient, 5),
    ("deform_aggregate", _aggregate_kernel, _aggregate_shape, _aggregate_gradient, 3),
    ("deform_aggregate_backward", _aggregate_backward_kernel, _aggregate_backward_shape, _aggregate_double_gradient, 4),
):
    implement(_LIBRARY, _name, _kernel, _shape, _gradient, _tensors)
