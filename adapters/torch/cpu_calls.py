"""Calls on CPU tensors, straight to the CPU backend. They have the interface of the prepared calls on CUDA tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._dispatch import load_backend
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvGeometry, DeformRoIPoolGeometry
from dcnops._threads import call_threads

from . import attention_operators
from .arrays import as_array, as_tensor
from .operators import match_memory_format, none_unless_needed

_DTYPES = frozenset(getattr(torch, name) for name in DTYPES)


class ConvCall(NamedTuple):
    """A deformable convolution. See `dcnops.adapters.torch.cuda_calls.ConvCall`."""

    geometry: DeformConvGeometry
    precision: str

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Further arguments of the operator."""
        g = self.geometry
        return [g.sh, g.sw], [g.pad_top, g.pad_bottom, g.pad_left, g.pad_right], [g.dh, g.dw], self.precision

    def forward(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the output."""
        arrays = map(as_array, (input, offset, weight, bias, mask))
        with call_threads(torch.get_num_threads()):
            output = load_backend("numpy").deform_conv2d(self.geometry, *arrays, self.precision)
        return match_memory_format(input, as_tensor(output))

    def backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients that are needed, in the memory format of their arguments; None for the others."""
        arguments = dict(zip(("input", "offset", "weight", "bias", "mask"), tensors))
        input, offset, weight, _, mask = tensors
        arrays = map(as_array, (grad_out, input, offset, weight, mask))
        with call_threads(torch.get_num_threads()):
            gradients = load_backend("numpy").deform_conv2d_backward(
                self.geometry, *arrays, _needed(arguments, needs), True, self.precision
            )
        return _gradient_tensors(arguments, gradients)


class RoICall(NamedTuple):
    """A deformable RoI pooling. See `dcnops.adapters.torch.cuda_roi_calls.RoICall`."""

    geometry: DeformRoIPoolGeometry

    @property
    def numbers(self) -> tuple[Any, ...]:
        """Further arguments of the operator."""
        g = self.geometry
        return [g.P, g.Q], g.spatial_scale, g.sampling_ratio, g.gamma

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the output."""
        arrays = map(as_array, (input, rois, offset, mask))
        with call_threads(torch.get_num_threads()):
            return as_tensor(load_backend("numpy").deform_roi_pool(self.geometry, *arrays))

    @staticmethod
    def has_backward(needs: tuple[bool, ...]) -> bool:
        """Check for gradients to compute."""
        return any(needs)

    def backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients of input, offset and mask that are needed; None for the others."""
        input, _, offset, mask = tensors
        arguments = {"input": input, "offset": offset, "mask": mask}
        arrays = map(as_array, (grad_out, *tensors))
        with call_threads(torch.get_num_threads()):
            gradients = load_backend("numpy").deform_roi_pool_backward(
                self.geometry, *arrays, _needed(arguments, needs), True
            )
        return _gradient_tensors(arguments, gradients)


class AttentionCall(NamedTuple):
    """A multi-scale deformable attention."""

    geometry: MSDeformAttnGeometry
    is_flat: bool
    """See `attention_operators`."""

    def forward(self, value: Tensor, sampling_locations: Tensor, attention_weights: Tensor) -> Tensor:
        """Return the output."""
        value_array, *arrays = map(as_array, (value, sampling_locations, attention_weights))
        with call_threads(torch.get_num_threads()):
            return as_tensor(load_backend("numpy").ms_deform_attn(self.geometry, value_array, None, *arrays))

    def backward(self, grad_out: Tensor, tensors: Sequence[Tensor], needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Return the gradients that are needed; None for the others."""
        arguments = dict(zip(("value", "sampling_locations", "attention_weights"), tensors))
        grad_array, value_array, *arrays = map(as_array, (grad_out, *tensors))
        with call_threads(torch.get_num_threads()):
            gradients = load_backend("numpy").ms_deform_attn_backward(
                self.geometry, grad_array, value_array, None, *arrays, _needed(arguments, needs), True
            )
        return [as_tensor(gradients[name]) if name in gradients else None for name in arguments]

    def operator_backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients from the operator, which has a gradient itself."""
        shapes = [extent for shape in self.geometry.shapes or () for extent in shape]
        numbers = shapes, self.geometry.points, self.is_flat
        value, *sampling = tensors
        arguments = (grad_out, value, None, *sampling, *numbers, list(needs))
        return none_unless_needed(attention_operators.ms_deform_attn_backward(*arguments), needs)


class AggregateCall(NamedTuple):
    """A deformable aggregation."""

    geometry: DeformAggregateGeometry

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None) -> Tensor:
        """Return the output."""
        arrays = map(as_array, (input, offset, mask))
        with call_threads(torch.get_num_threads()):
            return as_tensor(load_backend("numpy").deform_aggregate(self.geometry, *arrays))

    def backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients that are needed; None for the others."""
        arguments = dict(zip(("input", "offset", "mask"), tensors))
        arrays = map(as_array, (grad_out, *tensors))
        with call_threads(torch.get_num_threads()):
            gradients = load_backend("numpy").deform_aggregate_backward(
                self.geometry, *arrays, _needed(arguments, needs), True
            )
        return [as_tensor(gradients[name]) if name in gradients else None for name in arguments]

    def operator_backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: tuple[bool, ...]
    ) -> list[Tensor | None]:
        """Return the gradients from the operator, which has a gradient itself."""
        arguments = (grad_out, *tensors, *attention_operators.aggregate_numbers(self.geometry), list(needs))
        return none_unless_needed(attention_operators.deform_aggregate_backward(*arguments), needs)


def conv_call(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    precision: str,
) -> ConvCall | None:
    """Check the sizes of a convolution; return None for dtypes or devices that the operator itself has to look at."""
    if not _fit((input, weight, bias), (offset, mask)):
        return None
    return ConvCall(DeformConvGeometry.of(input, offset, weight, bias, mask, stride, padding, dilation), precision)


def roi_call(input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None, *numbers: Any) -> RoICall | None:
    """Check the sizes of a RoI pooling; return None for dtypes or devices that the operator itself has to look at."""
    if not (_fit((input,), (offset, mask)) and rois.is_cpu and rois.dtype in _DTYPES):
        return None
    return RoICall(DeformRoIPoolGeometry.of(input, rois, offset, mask, *numbers))


def attention_call(
    value: Tensor, spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor, points: Any
) -> AttentionCall | None:
    """Check the sizes of an attention; return None for what the operator itself has to look at."""
    if not _fit((value,), (sampling_locations, attention_weights)):
        return None
    if isinstance(spatial_shapes, Tensor):
        if not spatial_shapes.is_cpu or spatial_shapes.dtype not in (torch.int32, torch.int64):
            return None
        spatial_shapes = spatial_shapes.tolist()
    geometry = MSDeformAttnGeometry.of(value, spatial_shapes, sampling_locations, attention_weights, points)
    return AttentionCall(geometry, sampling_locations.ndim == 5)


def aggregate_call(input: Tensor, offset: Tensor, mask: Tensor | None, *numbers: Any) -> AggregateCall | None:
    """Check the sizes of an aggregation; return None for dtypes or devices that the operator itself has to look at."""
    if not _fit((input,), (offset, mask)):
        return None
    return AggregateCall(DeformAggregateGeometry.of(input, offset, mask, *numbers))


def _fit(data: tuple[Any, ...], sampling: tuple[Tensor | None, ...]) -> bool:
    """Check for CPU tensors of dtypes that need no conversion."""
    dtype = data[0].dtype
    if dtype not in _DTYPES:
        return False
    for tensor in data:
        if tensor is not None and (tensor.dtype is not dtype or not tensor.is_cpu):
            return False
    first = None
    for tensor in sampling:
        if tensor is not None:
            first = first or tensor.dtype
            if tensor.dtype is not first or not tensor.is_cpu:
                return False
    return first in (None, dtype) or (first is torch.float32 and dtype.itemsize == 2)


def _needed(arguments: Iterable[str], needs: tuple[bool, ...]) -> frozenset[str]:
    return frozenset(name for name, need in zip(arguments, needs) if need)


def _gradient_tensors(arguments: dict[str, Tensor | None], gradients: dict[str, Any]) -> list[Tensor | None]:
    return [
        match_memory_format(argument, as_tensor(gradients[name])) if name in gradients else None
        for name, argument in arguments.items()
    ]
