"""Prepared calls of multi-scale deformable attention and deformable aggregation on CUDA tensors: as `cuda_calls`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.kernel_constants import VECTOR_BYTES
from dcnops._backends.cuda.programs import ArrayForm, Replay, SignatureCache
from dcnops._backends.cuda.workspace import get_workspace

from . import attention_operators, devices
from .cuda_calls import DTYPE_NAMES, Needs, numpy_dtype
from .operators import none_unless_needed


class _Call:
    """All that the calls of one signature share. The device of the tensors must be current.

    Parameters
    ----------
    geometry
        Sizes of the call.
    tensors : sequence of Tensor or None
        Arguments of the plan; they satisfy `can_be_prepared`.
    """

    names: tuple[str, ...]
    """Names of `tensors`."""
    plan: Callable[..., Any]
    backward_plan: Callable[..., Any]

    def __init__(self, geometry: Any, tensors: Sequence[Tensor | None]) -> None:
        data = tensors[0]
        assert data is not None
        self.geometry = geometry
        self._forms = [None if tensor is None else _form(tensor) for tensor in tensors]
        self._device, self._index, self._dtype = data.device, data.get_device(), data.dtype
        self._forward = devices.recorded_programs().record(type(self).plan, geometry, self._forms, ())
        self._backward: dict[tuple[Needs, bool], Replay] = {}

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self._forward.nbytes + sum(replay.nbytes for replay in list(self._backward.values()))

    def forward(self, *tensors: Tensor | None) -> Tensor:
        """Return the output of contiguous tensors, the first of which is aligned."""
        output = torch.empty(self.geometry.output_shape, dtype=self._dtype, device=self._device)
        self._issue(self._forward, (*tensors, output))
        return output

    def backward(self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: Needs) -> list[Tensor | None]:
        """Return the gradients that are needed; None for the others.

        Hooks may have changed the memory order or alignment of the saved `tensors`, as in the convolution.
        """
        data, *sampling = (None if tensor is None else tensor.contiguous() for tensor in tensors)
        assert data is not None
        grad_out, data = _aligned(grad_out.contiguous()), _aligned(data)
        key = needs, torch.are_deterministic_algorithms_enabled()
        replay = self._backward.get(key)
        if replay is None:
            form = ArrayForm(self.geometry.output_shape, numpy_dtype(self._dtype))
            names = frozenset(name for name, need in zip(self.names, needs) if need)
            options = names, key[1], get_workspace()
            replay = self._backward[key] = devices.recorded_programs().record(
                type(self).backward_plan, self.geometry, [form, *self._forms], options
            )
            CALLS.trim()
        arguments = (data, *sampling)
        gradients = [torch.empty_like(tensor) if need else None for tensor, need in zip(arguments, needs)]
        self._issue(replay, (grad_out, *arguments, *gradients))
        return gradients

    def _issue(self, replay: Replay, tensors: Sequence[Tensor | None]) -> None:
        # Not a tensor: with deterministic algorithms enabled, torch fills the memory of new tensors.
        scratch = torch.UntypedStorage(replay.program.scratch_bytes, device=self._device)
        addresses = [0, *(tensor.data_ptr() for tensor in tensors if tensor is not None), scratch.data_ptr()]
        replay.issue(addresses, devices.current_stream(self._index))


def _attention_gradients(engine: Any, geometry: MSDeformAttnGeometry, *arguments: Any) -> dict[str, Any]:
    """Run the backward plan; return its results in the order of the arguments of the forward pass."""
    gradients = plans.ms_deform_attn_backward(engine, geometry, *arguments)
    return {name: gradients[name] for name in AttentionCall.names if name in gradients}


def _aggregate_gradients(engine: Any, geometry: DeformAggregateGeometry, *arguments: Any) -> dict[str, Any]:
    """Run the backward plan; return its results in the order of the arguments of the forward pass."""
    gradients = plans.deform_aggregate_backward(engine, geometry, *arguments)
    return {name: gradients[name] for name in AggregateCall.names if name in gradients}


class AttentionCall(_Call):
    """Multi-scale deformable attention of (value, spatial_shapes or None, sampling_locations, attention_weights)."""

    names = ("value", "spatial_shapes", "sampling_locations", "attention_weights")
    plan = plans.ms_deform_attn
    backward_plan = _attention_gradients

    def operator_backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: Needs
    ) -> list[Tensor | None]:
        """Return the gradients from the operator, which has a gradient itself."""
        shapes = [extent for shape in self.geometry.shapes or () for extent in shape]
        locations = tensors[2]
        assert locations is not None
        numbers = shapes, self.geometry.points, locations.ndim == 5
        wanted = [needs[0], *needs[2:]]
        gradients = attention_operators.ms_deform_attn_backward(grad_out, *tensors, *numbers, wanted)
        value, *sampling = none_unless_needed(gradients, wanted)
        return [value, None, *sampling]


class AggregateCall(_Call):
    """Deformable aggregation of (input, offset, mask or None)."""

    names = ("input", "offset", "mask")
    plan = plans.deform_aggregate
    backward_plan = _aggregate_gradients

    def operator_backward(
        self, grad_out: Tensor, tensors: Sequence[Tensor | None], needs: Needs
    ) -> list[Tensor | None]:
        """Return the gradients from the operator, which has a gradient itself."""
        arguments = (grad_out, *tensors, *attention_operators.aggregate_numbers(self.geometry), list(needs))
        return none_unless_needed(attention_operators.deform_aggregate_backward(*arguments), needs)


CALLS: SignatureCache[_Call] = SignatureCache()


def prepared_call(kind: type[_Call], key: Any, geometry: Callable[[], Any], tensors: Sequence[Any]) -> _Call | None:
    """Return the call of a signature, from the second time on; `geometry` computes and checks its sizes."""
    signature = (kind, key, *(None if t is None else (t.shape, t.dtype, t.device) for t in tensors))
    call = CALLS.get(signature)
    data, *others = tensors
    shapes = others.pop(0) if kind is AttentionCall else None
    if call is None and can_be_prepared(data, others, shapes):
        call = CALLS.add(signature, lambda: kind(geometry(), tensors))
        if call is None:
            CALLS.see(signature)
    return call


def can_be_prepared(data: Tensor, sampling: Sequence[Tensor | None], spatial_shapes: Tensor | None) -> bool:
    """Check for dtypes that the operator takes as they are, on one device, and at least one element."""
    given = [tensor for tensor in sampling if tensor is not None]
    tensors = [data, *given, *([] if spatial_shapes is None else [spatial_shapes])]
    legal = (torch.float32, data.dtype) if data.dtype.itemsize == 2 else (data.dtype,)
    return (
        data.dtype in DTYPE_NAMES
        and given[0].dtype in legal
        and all(tensor.dtype == given[0].dtype for tensor in given)
        and (spatial_shapes is None or spatial_shapes.dtype in (torch.int32, torch.int64))
        and len({tensor.device for tensor in tensors}) == 1
        and all(tensor.numel() for tensor in tensors)
    )


def _form(tensor: Tensor) -> ArrayForm:
    """Return what a plan sees of a contiguous tensor."""
    dtype = numpy_dtype(tensor.dtype) if tensor.dtype in DTYPE_NAMES else np.dtype(str(tensor.dtype).split(".")[1])
    return ArrayForm(tuple(tensor.shape), dtype)


def _aligned(tensor: Any) -> Any:
    return tensor.clone() if tensor.data_ptr() % VECTOR_BYTES else tensor
