"""Prepared calls on CUDA tensors: recorded programs on torch's memory and current stream, without arrays."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.programs import ArrayForm, Replay, SignatureCache
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
        self.copied = frozenset(i for i, tensor in enumerate(tensors) if tensor is not None and not is_dense(tensor))
        self._precision = precision
        self._forms = [None if tensor is None else _form(tensor) for tensor in tensors]
        self._device, self._index, self._dtype = input.device, input.get_device(), input.dtype
        self._forward = devices.recorded_programs().record(plans.deform_conv2d, g, self._forms, (precision,))
        self._strides = _strides(self._forward.program.results[0])
        self._backward: dict[tuple[Needs, bool, bool], Replay] = {}

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self._forward.nbytes + sum(replay.nbytes for replay in self._backward.values())

    def forward(
        self, input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Return the output of dense tensors."""
        device, replay = self._device, self._forward
        output = torch.empty_strided(self._geometry.output_shape, self._strides, dtype=self._dtype, device=device)
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

    def backward(
        self,
        grad_out: Tensor,
        input: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        needs: Needs,
    ) -> list[Tensor | None]:
        """Return the gradients that are needed, in the memory format of their arguments; None for the others."""
        key = (needs, is_channels_last(grad_out), torch.are_deterministic_algorithms_enabled())
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
        options = names, deterministic, self._precision
        return devices.recorded_programs().record(
            _gradients_in_order, self._geometry, [grad_out, input, offset, weight, mask], options
        )


CALLS: SignatureCache[ConvCall] = SignatureCache()


def can_be_prepared(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None) -> bool:
    """Check for dtypes that the operator takes as they are, on one device, and at least one element."""
    data = [tensor for tensor in (input, weight, bias) if tensor is not None]
    sampling = [tensor for tensor in (offset, mask) if tensor is not None]
    legal = (torch.float32, input.dtype) if input.dtype.itemsize == 2 else (input.dtype,)
    return (
        input.dtype in DTYPE_NAMES
        and len({tensor.dtype for tensor in data}) == len({tensor.dtype for tensor in sampling}) == 1
        and offset.dtype in legal
        and len({tensor.device for tensor in (*data, *sampling)}) == 1
        and all(tensor.numel() for tensor in (*data, *sampling))
    )


def is_channels_last(tensor: Tensor) -> bool:
    """Check for the channels_last memory format that is not contiguous as well."""
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def is_dense(tensor: Tensor) -> bool:
    """Check for one of the two memory orders that plans take."""
    return tensor.is_contiguous() or is_channels_last(tensor)


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


def _form(tensor: Tensor) -> ArrayForm:
    """Return what a plan sees of a tensor after it was made dense."""
    return ArrayForm(tuple(tensor.shape), numpy_dtype(tensor.dtype), is_channels_last(tensor))


def _strides(form: ArrayForm) -> tuple[int, ...]:
    _, C, H, W = form.shape
    return (H * W * C, 1, W * C, C) if form.channels_last else (C * H * W, H * W, W, 1)
