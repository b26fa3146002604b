"""Prepared calls on CUDA tensors: recorded programs on torch's memory and current stream, without arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.kernel_constants import VECTOR_BYTES
from dcnops._backends.cuda.programs import ArrayForm, Replay, SignatureCache
from dcnops._backends.cuda.workspace import get_workspace
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvGeometry

from . import devices

Needs: TypeAlias = tuple[bool, ...]

_NAMES = ("input", "offset", "weight", "bias", "mask")
DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}


class ConvCall:
    """All that the deformable convolutions of one signature share. The device of the tensors must be current.

    Parameters
    ----------
    tensors : tuple (input, offset, weight, bias, mask)
        They satisfy `can_be_prepared`.
    stride, padding, dilation
        As in `dcnops.adapters.torch.deform_conv2d`.
    precision : {"ieee", "tf32", "3xtf32"}

    Attributes
    ----------
    copied : frozenset of int
        Positions of the tensors that have to be made contiguous before each call.
    numbers : tuple
        Further arguments of the operator.
    """

    def __init__(self, tensors: tuple[Any, ...], stride: Any, padding: Any, dilation: Any, precision: str) -> None:
        input, offset, weight, bias, mask = tensors
        g = self._geometry = DeformConvGeometry.of(input, offset, weight, bias, mask, stride, padding, dilation)
        sides = [g.pad_top, g.pad_bottom, g.pad_left, g.pad_right]
        self.numbers = ([g.sh, g.sw], sides, [g.dh, g.dw], precision)
        self.copied = frozenset(i for i, tensor in enumerate(tensors) if not _is_read_in_place(i, tensor))
        self._options = precision, get_workspace()
        self._forms = [
            None if tensor is None else _form(tensor, i not in self.copied) for i, tensor in enumerate(tensors)
        ]
        self._device, self._index, self._dtype = input.device, input.get_device(), input.dtype
        self._forward = devices.recorded_programs().record(plans.deform_conv2d, g, self._forms, self._options)
        self._output_shape, self._output_strides = g.output_shape, _strides(self._forward.program.results[0])
        self._strides = [
            None if tensor is None else (tensor.contiguous() if i in self.copied else tensor).stride()
            for i, tensor in enumerate(tensors)
        ]
        self._backward: dict[tuple[Needs, bool, bool], Replay] = {}

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self._forward.nbytes + sum(replay.nbytes for replay in list(self._backward.values()))

    def forward(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the output of tensors that were made contiguous where that is needed."""
        device, replay = self._device, self._forward
        output = torch.empty_strided(self._output_shape, self._output_strides, dtype=self._dtype, device=device)
        # Not a tensor: with deterministic algorithms enabled, torch fills the memory of new tensors.
        scratch = torch.UntypedStorage(replay.program.scratch_bytes, device=device)
        addresses = [0, input.data_ptr(), offset.data_ptr(), weight.data_ptr()]
        if bias is not None:
            addresses += (bias.data_ptr(),)
        if mask is not None:
            addresses += (mask.data_ptr(),)
        addresses += (output.data_ptr(), scratch.data_ptr())
        replay.issue(addresses, devices.current_stream(self._index))
        return output

    def backward(self, grad_out: Tensor, tensors: Sequence[Any], needs: Needs) -> list[Tensor | None]:
        """Return the gradients that are needed, in the memory format of their arguments; None for the others.

        Hooks may have changed the memory order or alignment of the saved `tensors`: `save_on_cpu` does, with pinned
        memory.
        """
        grad_out_last = False
        if not grad_out.is_contiguous():
            grad_out_last = is_channels_last(grad_out)
            if not grad_out_last:
                grad_out = grad_out.contiguous()
        input, offset, weight, bias, mask = tensors
        strides = self._strides
        if (
            input.stride() != strides[0]
            or offset.stride() != strides[1]
            or weight.stride() != strides[2]
            or (mask is not None and mask.stride() != strides[4])
        ):
            input, offset, weight, bias, mask = (
                None if tensor is None else tensor.new_empty_strided(tensor.shape, order).copy_(tensor)
                for tensor, order in zip(tensors, strides)
            )
        key = (needs, grad_out_last, torch.are_deterministic_algorithms_enabled())
        replay = self._backward.get(key)
        if replay is None:
            replay = self._backward[key] = self._record_backward(*key)
            CALLS.trim()
        arguments = (input, offset, weight, bias, mask)
        gradients = [
            torch.empty_like(tensor) if need and tensor is not None else None for tensor, need in zip(arguments, needs)
        ]
        scratch = torch.UntypedStorage(replay.program.scratch_bytes, device=self._device)
        addresses = [0, grad_out.data_ptr(), input.data_ptr(), offset.data_ptr(), weight.data_ptr()]
        if (addresses[1] | addresses[2] | addresses[4]) % VECTOR_BYTES:
            grad_out, input, weight = grad_out.clone(), input.clone(), weight.clone()
            addresses[1:5] = grad_out.data_ptr(), input.data_ptr(), offset.data_ptr(), weight.data_ptr()
        if mask is not None:
            addresses += (mask.data_ptr(),)
        addresses += [gradient.data_ptr() for gradient in gradients if gradient is not None]
        addresses += (scratch.data_ptr(),)
        replay.issue(addresses, devices.current_stream(self._index))
        return gradients

    def _record_backward(self, needs: Needs, grad_out_last: bool, deterministic: bool) -> Replay:
        input, offset, weight, _, mask = self._forms
        assert input is not None
        grad_out = ArrayForm(self._geometry.output_shape, input.dtype, grad_out_last)
        names = frozenset(name for name, need, form in zip(_NAMES, needs, self._forms) if need and form is not None)
        options = names, deterministic, *self._options
        return devices.recorded_programs().record(
            _gradients_in_order, self._geometry, [grad_out, input, offset, weight, mask], options
        )


CALLS: SignatureCache[ConvCall] = SignatureCache()


def can_be_prepared(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Check for dtypes that the operator takes as they are, on one device, and at least one element."""
    tensors = [tensor for tensor in (input, offset, weight, bias, mask) if tensor is not None]
    legal = (torch.float32, input.dtype) if input.dtype.itemsize == 2 else (input.dtype,)
    return (
        input.dtype in DTYPE_NAMES
        and (bias is None or bias.dtype == input.dtype)
        and (mask is None or mask.dtype == offset.dtype)
        and weight.dtype in legal
        and offset.dtype in legal
        and len({tensor.device for tensor in tensors}) == 1
        and all(tensor.numel() for tensor in tensors)
    )


def is_channels_last(tensor: Tensor) -> bool:
    """Check for the channels_last memory format that is not contiguous as well."""
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def is_dense(tensor: Tensor) -> bool:
    """Check for one of the two memory orders that plans take."""
    return tensor.is_contiguous() or is_channels_last(tensor)


def _is_read_in_place(position: int, tensor: Tensor | None) -> bool:
    """Check for a memory order in which the plans read the tensor at a position of the arguments."""
    if tensor is None or is_dense(tensor):
        return True
    if _NAMES[position] not in ("offset", "mask"):
        return False
    # A part of a branch's output has evenly spaced pixels.
    image, channel, row, pixel = tensor.stride()
    if row != tensor.shape[3] * pixel or min(image, channel, pixel) <= 0 or max(channel, pixel) >= 2**31:
        return False
    # Plans compute contiguous or channels_last gradients, see `empty_images`. `backward` allocates by `empty_like`.
    order = _strides(ArrayForm(tuple(tensor.shape), None, channels_last=channel < pixel))
    gradient = torch.empty_like(tensor, device="meta")
    return all(n == 1 or a == b for n, a, b in zip(tensor.shape, gradient.stride(), order))


def _gradients_in_order(engine: Any, geometry: DeformConvGeometry, *arguments: Any) -> dict[str, Any]:
    """Run the backward plan; return its results in the order of the arguments of the forward pass."""
    gradients = plans.deform_conv2d_backward(engine, geometry, *arguments)
    return {name: gradients[name] for name in _NAMES if name in gradients}


def numpy_dtype(dtype: torch.dtype) -> Any:
    name = DTYPE_NAMES[dtype]
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _form(tensor: Tensor, in_place: bool) -> ArrayForm:
    """Return what a plan sees of a tensor, or of its contiguous copy."""
    dtype = numpy_dtype(tensor.dtype)
    channels_last = in_place and is_channels_last(tensor)
    has_strides = in_place and not channels_last and not tensor.is_contiguous()
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride()) if has_strides else None
    return ArrayForm(tuple(tensor.shape), dtype, channels_last, strides)


def _strides(form: ArrayForm) -> tuple[int, ...]:
    _, C, H, W = form.shape
    return (H * W * C, 1, W * C, C) if form.channels_last else (C * H * W, H * W, W, 1)
