"""Custom operators `torch.ops.dcnops`: implementations, output shapes and gradients.

Each forward and each backward pass is an operator, so `torch.compile` and `torch.export` see four opaque calls. A
backward operator returns one tensor per differentiable argument, which is empty if that gradient is not needed. The
gradient of a backward operator (double backward) is computed by `differentiable`.

Deformable attention and aggregation are in `attention_operators`.

Operator schemas allow only flat lists, so `padding` is [top, bottom, left, right] here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dcnops
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry, check_conv_ranks, check_roi_ranks

from . import differentiable
from .arrays import as_array, as_tensor, coordinate_dtype
from .devices import DEVICES, on_device_of
from .flops import register_formulas
from .precision import precision_now

_CONV_TENSORS = "Tensor input, Tensor offset, Tensor weight, Tensor? bias, Tensor? mask"
_CONV_NUMBERS = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, str precision"
_ROI_TENSORS = "Tensor input, Tensor rois, Tensor? offset, Tensor? mask"
_ROI_NUMBERS = "SymInt[] output_size, float spatial_scale, SymInt sampling_ratio, float gamma"

_ATTN_TENSORS = "Tensor value, Tensor? spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
_ATTN_NUMBERS = "SymInt[] shapes, SymInt[] points, bool is_flat"
_AGGREGATE_TENSORS = "Tensor input, Tensor offset, Tensor? mask"
_AGGREGATE_NUMBERS = (
    "SymInt groups, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, float offset_scale, "
    "bool remove_center"
)

_SCHEMAS = (
    f"deform_conv2d({_CONV_TENSORS}, {_CONV_NUMBERS}) -> Tensor",
    f"deform_conv2d_backward(Tensor grad_out, {_CONV_TENSORS}, {_CONV_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"deform_roi_pool({_ROI_TENSORS}, {_ROI_NUMBERS}) -> Tensor",
    f"deform_roi_pool_backward(Tensor grad_out, {_ROI_TENSORS}, {_ROI_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    f"ms_deform_attn({_ATTN_TENSORS}, {_ATTN_NUMBERS}) -> Tensor",
    f"ms_deform_attn_backward(Tensor grad_out, {_ATTN_TENSORS}, {_ATTN_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
    f"deform_aggregate({_AGGREGATE_TENSORS}, {_AGGREGATE_NUMBERS}) -> Tensor",
    f"deform_aggregate_backward(Tensor grad_out, {_AGGREGATE_TENSORS}, {_AGGREGATE_NUMBERS}, bool[] needs)"
    " -> (Tensor, Tensor, Tensor)",
)


def implementation_library(name: str) -> torch.library.Library:
    """Define the operators, unless this module was imported before; return the library of a module's implementations.

    Torch allows one definition per process. Implementations of an earlier import of the module are removed.
    """
    libraries: dict[str, Any] = vars(torch.ops.dcnops)
    if "_definitions" not in libraries:
        libraries["_definitions"] = torch.library.Library("dcnops", "DEF")
        for schema in _SCHEMAS:
            libraries["_definitions"].define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if name in libraries:
        libraries[name]._destroy()
    libraries[name] = library = torch.library.Library("dcnops", "IMPL")
    return library


_LIBRARY = implementation_library("_implementations")

deform_conv2d = torch.ops.dcnops.deform_conv2d.default
deform_roi_pool = torch.ops.dcnops.deform_roi_pool.default
deform_conv2d_backward = torch.ops.dcnops.deform_conv2d_backward.default
deform_roi_pool_backward = torch.ops.dcnops.deform_roi_pool_backward.default


def _padding_pairs(padding: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    top, bottom, left, right = padding
    return (top, bottom), (left, right)


def as_arrays(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: as_array(tensor) for name, tensor in tensors.items()}


def _coordinates(rois: Tensor, input: Tensor) -> Tensor:
    """Return the regions in the form that the kernels take. A conversion by CuPy would be compiled at first use."""
    return rois.to(coordinate_dtype(input)).contiguous() if input.is_cuda and rois.is_floating_point() else rois


def needed_names(needs: Sequence[bool], *names: str) -> list[str]:
    return [name for name, need in zip(names, needs) if need]


def _gradient_tensors(gradients: Sequence[Any], arguments: Sequence[Tensor | None]) -> list[Tensor]:
    """Convert gradient arrays to tensors, each in the memory format of its argument."""
    return [
        _empty_gradient(arguments) if array is None else match_memory_format(argument, as_tensor(array))
        for array, argument in zip(gradients, arguments)
    ]


def _empty_gradient(arguments: Sequence[Tensor | None]) -> Tensor:
    input = arguments[0]
    assert input is not None
    return input.new_empty(0)


def match_memory_format(reference: Tensor | None, images: Tensor) -> Tensor:
    """Convert `images` to channels_last if `reference` has that memory format."""
    if reference is None or not _is_channels_last(reference):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def _is_channels_last(images: Tensor) -> bool:
    """Check for the channels_last memory format that is not contiguous as well."""
    if images.ndim != 4:
        return False
    if not images._has_symbolic_sizes_strides:
        return not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    _, C, H, W = images.shape
    strides = zip(images.stride(), (C * H * W, 1, C * W, C))
    return statically_known_true(C != 1) and all(statically_known_true(a == b) for a, b in strides)


# Implementations


def _conv_forward_kernel(
    input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], precision: str,
) -> Tensor:  # fmt: skip
    with on_device_of(input):
        output = dcnops.deform_conv2d(
            **as_arrays(input=input, offset=offset, weight=weight, bias=bias, mask=mask),
            stride=stride, padding=_padding_pairs(padding), dilation=dilation,
            precision=precision_now(precision),
        )  # fmt: skip
        return match_memory_format(input, as_tensor(output))


def _conv_backward_kernel(
    grad_out: Tensor, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], precision: str, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with on_device_of(input):
        gradients = dcnops.deform_conv2d_backward(
            **as_arrays(grad_out=grad_out, input=input, offset=offset, weight=weight, bias=bias, mask=mask),
            stride=stride, padding=_padding_pairs(padding), dilation=dilation,
            precision=precision_now(precision),
            needs=needed_names(needs, "input", "offset", "weight", "bias", "mask"),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return _gradient_tensors(gradients, (input, offset, weight, bias, mask))


def _roi_forward_kernel(
    input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None,
    output_size: list[int], spatial_scale: float, sampling_ratio: int, gamma: float,
) -> Tensor:  # fmt: skip
    with on_device_of(input):
        output = dcnops.deform_roi_pool(
            **as_arrays(input=input, rois=_coordinates(rois, input), offset=offset, mask=mask),
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
        )  # fmt: skip
        return as_tensor(output)


def _roi_backward_kernel(
    grad_out: Tensor, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None,
    output_size: list[int], spatial_scale: float, sampling_ratio: int, gamma: float, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    with on_device_of(input):
        gradients = dcnops.deform_roi_pool_backward(
            **as_arrays(grad_out=grad_out, input=input, rois=_coordinates(rois, input), offset=offset, mask=mask),
            output_size=output_size, spatial_scale=spatial_scale, sampling_ratio=sampling_ratio, gamma=gamma,
            needs=needed_names(needs, "input", "offset", "mask"),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return _gradient_tensors(gradients, (input, offset, mask))


# Output shapes, for tracing
#
# A comparison of symbolic sizes becomes a guard of the compiled program, which then refuses other sizes or is compiled
# again. Symbolic sizes are therefore not checked here but where they are known: when the operator runs.


def has_symbols(*arguments: Any) -> bool:
    """Check for a tensor with symbolic sizes or a symbolic number."""
    return any(
        argument._has_symbolic_sizes_strides
        if isinstance(argument, Tensor)
        else has_symbols(*argument)
        if isinstance(argument, (list, tuple))
        else isinstance(argument, (torch.SymInt, torch.SymFloat))
        for argument in arguments
    )


def _check_conv(arguments: Sequence[Any], grad_out: Tensor | None = None) -> None:
    input, offset, weight, bias, mask, stride, padding, dilation, _ = arguments
    if has_symbols(grad_out, *arguments):
        check_conv_ranks(input.shape, offset.shape, weight.shape, None if mask is None else mask.shape)
        return
    pairs = _padding_pairs(padding)
    geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride, pairs, dilation)
    if grad_out is not None:
        geometry.check_grad_out(tuple(grad_out.shape))


def _check_roi_pool(arguments: Sequence[Any], grad_out: Tensor | None = None) -> None:
    if has_symbols(grad_out, *arguments):
        check_roi_ranks(arguments[0].shape, arguments[1].shape)
        return
    geometry = DeformRoIPoolGeometry.of(*arguments)
    if grad_out is not None:
        geometry.check_grad_out(tuple(grad_out.shape))


def _conv_forward_shape(*args: Any) -> Tensor:
    _check_conv(args)
    input, offset, weight = args[:3]
    return match_memory_format(input, input.new_empty((input.shape[0], weight.shape[0], *offset.shape[2:])))


def _conv_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    _check_conv(args[:-1], grad_out)
    return _gradient_shapes(args[:5], args[-1])


def _roi_forward_shape(*args: Any) -> Tensor:
    _check_roi_pool(args)
    input, rois, output_size = args[0], args[1], args[4]
    output: Tensor = input.new_empty((rois.shape[0], input.shape[1], *output_size))
    return output


def _roi_backward_shape(grad_out: Tensor, *args: Any) -> list[Tensor]:
    _check_roi_pool(args[:-1], grad_out)
    return _gradient_shapes((args[0], args[2], args[3]), args[-1])


def _gradient_shapes(arguments: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    return [
        _empty_gradient(arguments)
        if argument is None or not need
        else match_memory_format(argument, argument.new_empty(argument.shape))
        for argument, need in zip(arguments, needs)
    ]


# Gradients


def _register_autograd(
    library: torch.library.Library, name: str, gradient: Callable[..., tuple[Any, ...]], tensors: int
) -> None:
    """Give an operator, of which the first `tensors` arguments are tensors, its gradient.

    `torch.library.register_autograd` does the same but adds 60 microseconds to every recorded call.
    """
    operator = getattr(torch.ops.dcnops, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            ctx.save_for_backward(*arguments[:tensors])
            ctx.numbers = arguments[tensors:]
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)

        backward = staticmethod(gradient)

    def kernel(*arguments: Any) -> Any:
        register_formulas()
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in arguments[:tensors]
        ):
            return Gradient.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    library.impl(name, kernel, "Autograd")


def _conv_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(need) for need in ctx.needs_input_grad[:5]]
    gradients = deform_conv2d_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    return (*none_unless_needed(gradients, needs), None, None, None, None)


def _roi_gradient(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 2, 3)]
    gradients = deform_roi_pool_backward(grad_out, *ctx.saved_tensors, *ctx.numbers, needs)
    input, offset, mask = none_unless_needed(gradients, needs)
    return (input, None, offset, mask, None, None, None, None)


def none_unless_needed(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if need else None for gradient, need in zip(gradients, needs)]


def _conv_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    stride, padding, dilation, _, needs = ctx.numbers
    numbers: list[Any] = [stride, _padding_pairs(padding), dilation]

    def forward(*tensors: Any) -> Tensor:
        return differentiable.deform_conv2d(*tensors, *numbers)

    return (*second_gradients(ctx, forward, range(1, 6), needs, gradients), None, None, None, None, None)


def _roi_double_gradient(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    *numbers, needs = ctx.numbers

    def forward(*tensors: Any) -> Tensor:
        return differentiable.deform_roi_pool(*tensors, *numbers)

    return (*second_gradients(ctx, forward, (1, 3, 4), needs, gradients), None, None, None, None, None)


def second_gradients(
    ctx: Any,
    forward: Callable[..., Tensor],
    differentiated: Sequence[int],
    needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> list[Tensor | None]:
    """Differentiate sum_i <gradients[i], first gradient i> with respect to the saved tensors.

    The saved tensors are `grad_out` and the tensors of the forward pass. `differentiated` holds the positions of the
    tensors that have a first gradient, and `needs` tells which of these gradients were computed.
    """
    with torch.enable_grad():
        leaves = [
            None if tensor is None else tensor.detach().requires_grad_(i == 0 or i in differentiated)
            for i, tensor in enumerate(ctx.saved_tensors)
        ]
        computed = [(leaves[i], gradient) for i, gradient, need in zip(differentiated, gradients, needs) if need]
        variables = [leaf for leaf, _ in computed if leaf is not None]
        first = torch.autograd.grad(forward(*leaves[1:]), variables, leaves[0], create_graph=True)
    targets = {i: leaf for i, leaf in enumerate(leaves) if leaf is not None and ctx.needs_input_grad[i]}
    weights = [gradient for _, gradient in computed]
    second = torch.autograd.grad(first, list(targets.values()), weights, allow_unused=True)
    return [dict(zip(targets, second)).get(i) for i in range(len(leaves))]


def implement(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Any],
    shape: Callable[..., Any],
    gradient: Callable[..., tuple[Any, ...]],
    tensors: int,
) -> None:
    """Give an operator its kernel, its function of output shapes and its gradient."""
    for key in DEVICES.values():
        torch.library.impl(f"dcnops::{name}", key, kernel, lib=library)
    torch.library.register_fake(f"dcnops::{name}", shape, lib=library)
    _register_autograd(library, name, gradient, tensors)


implement(_LIBRARY, "deform_conv2d", _conv_forward_kernel, _conv_forward_shape, _conv_gradient, 5)
implement(_LIBRARY, "deform_conv2d_backward", _conv_backward_kernel, _conv_backward_shape, _conv_double_gradient, 6)
implement(_LIBRARY, "deform_roi_pool", _roi_forward_kernel, _roi_forward_shape, _roi_gradient, 4)
implement(_LIBRARY, "deform_roi_pool_backward", _roi_backward_kernel, _roi_backward_shape, _roi_double_gradient, 5)
