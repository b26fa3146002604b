"""Prepared calls of RoI pooling on CUDA tensors: as `cuda_calls`, but for any number of regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dcnops._arguments import MAX_EXTENT
from dcnops._backends.cuda import plans
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolCall
from dcnops._backends.cuda.kernel_constants import VECTOR_BYTES
from dcnops._backends.cuda.programs import ArrayForm, SignatureCache
from dcnops._shapes import DeformRoIPoolGeometry

from . import devices
from .arrays import coordinate_dtype
from .cuda_calls import DTYPE_NAMES, Needs, is_channels_last, is_dense, numpy_dtype


class RoICall:
    """All that the RoI poolings of one signature share. The device of the tensors must be current.

    Parameters
    ----------
    input, rois, offset, mask : Tensor
        They satisfy `can_be_prepared`.
    output_size, spatial_scale, sampling_ratio, gamma
        As in `dcnops.adapters.torch.deform_roi_pool`.

    Attributes
    ----------
    numbers : tuple
        Further arguments of the operator.
    memory_format : torch.memory_format
        Memory format that `input` must be converted to before each call.
    """

    def __init__(
        self,
        input: Tensor,
        rois: Tensor,
        offset: Tensor | None,
        mask: Tensor | None,
        output_size: tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        gamma: float,
    ) -> None:
        g = self._geometry = DeformRoIPoolGeometry.of(
            input, rois, offset, mask, output_size, spatial_scale, sampling_ratio, gamma
        )
        self.numbers = ([g.P, g.Q], g.spatial_scale, g.sampling_ratio, g.gamma)
        self._rois_dtype = coordinate_dtype(input)
        self.memory_format = torch.channels_last if is_channels_last(input) else torch.contiguous_format
        self._device, self._index, self._dtype = input.device, input.get_device(), input.dtype
        self._forms = [
            ArrayForm(tuple(input.shape), numpy_dtype(input.dtype), is_channels_last(input)),
            ArrayForm((g.R, 5), numpy_dtype(self._rois_dtype), False),
            *(
                None if tensor is None else ArrayForm(tuple(tensor.shape), numpy_dtype(tensor.dtype), False)
                for tensor in (offset, mask)
            ),
        ]
        self._forward = devices.roi_pool_programs().record(plans.deform_roi_pool, g, self._forms, ())
        self._backward: dict[tuple[Needs, bool], RoIPoolCall] = {}

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self._forward.nbytes + sum(call.nbytes for call in list(self._backward.values()))

    def forward(self, input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> Tensor:
        """Return the output. `input` has the memory format of the call, `offset` and `mask` are contiguous."""
        g, device, prepared, regions = self._geometry, self._device, self._forward, rois.shape[0]
        rois = self._coordinates(rois)
        output = torch.empty((regions, g.C, g.P, g.Q), dtype=self._dtype, device=device)
        scratch = torch.UntypedStorage(prepared.scratch_bytes, device=device)
        addresses = [0, input.data_ptr(), rois.data_ptr()]
        if offset is not None:
            addresses += (offset.data_ptr(),)
        if mask is not None:
            addresses += (mask.data_ptr(),)
        addresses += (output.data_ptr(), scratch.data_ptr())
        prepared.issue(addresses, devices.current_stream(self._index), regions)
        return output

    @staticmethod
    def has_backward(needs: Needs) -> bool:
        """Check for gradients to compute, and that of the input not deterministically."""
        return any(needs) and not (needs[0] and torch.are_deterministic_algorithms_enabled())

    def backward(
        self, grad_out: Tensor, tensors: Sequence[Any], needs: Needs
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of input, offset and mask that are needed; None for the others. See `has_backward`.

        Hooks may have changed the memory order or alignment of the saved `tensors`, as in the convolution.
        """
        if not is_dense(grad_out) or grad_out.data_ptr() % VECTOR_BYTES:
            grad_out = grad_out.clone(memory_format=torch.contiguous_format)
        input, rois, *sampling = tensors
        input = input.contiguous(memory_format=self.memory_format)
        if input.data_ptr() % VECTOR_BYTES:
            input = input.clone()
        rois = self._coordinates(rois)
        offset, mask = (None if tensor is None else tensor.contiguous() for tensor in sampling)
        key = (needs, is_channels_last(grad_out))
        prepared = self._backward.get(key)
        if prepared is None:
            prepared = self._backward[key] = self._record_backward(*key)
            ROI_CALLS.trim()
        grad_input = torch.empty_like(input) if needs[0] else None
        grad_offset = torch.empty_like(offset) if needs[1] and offset is not None else None
        grad_mask = torch.empty_like(mask) if needs[2] and mask is not None else None
        scratch = torch.UntypedStorage(prepared.scratch_bytes, device=self._device)
        addresses = [0]
        for tensor in (grad_out, input, rois, offset, mask, grad_offset, grad_mask, grad_input):
            if tensor is not None:
                addresses += (tensor.data_ptr(),)
        addresses += (scratch.data_ptr(),)
        prepared.issue(addresses, devices.current_stream(self._index), rois.shape[0])
        return grad_input, grad_offset, grad_mask

    def _coordinates(self, rois: Tensor) -> Tensor:
        """Return the regions as the kernels take them. The backward pass saves the given ones, as the operator does."""
        return (rois if rois.dtype is self._rois_dtype else rois.to(self._rois_dtype)).contiguous()

    def _record_backward(self, needs: Needs, grad_out_last: bool) -> RoIPoolCall:
        input = self._forms[0]
        assert input is not None
        grad_out = ArrayForm(self._geometry.output_shape, input.dtype, grad_out_last)
        names = frozenset(name for name, need in zip(("input", "offset", "mask"), needs) if need)
        return devices.roi_pool_programs().record(
            plans.deform_roi_pool_backward, self._geometry, [grad_out, *self._forms], (names,)
        )


ROI_CALLS: SignatureCache[RoICall] = SignatureCache()


def can_be_prepared(input: Tensor, rois: Tensor, offset: Tensor | None, mask: Tensor | None) -> bool:
    """Check for dtypes that the operator takes as they are, on one device, and at least one element of `input`."""
    sampling = [tensor for tensor in (offset, mask) if tensor is not None]
    legal = (torch.float32, input.dtype) if input.dtype.itemsize == 2 else (input.dtype,)
    return (
        input.dtype in DTYPE_NAMES
        and rois.dtype in DTYPE_NAMES
        and len({tensor.dtype for tensor in sampling}) <= 1
        and all(tensor.dtype in legal for tensor in sampling)
        and len({tensor.device for tensor in (input, rois, *sampling)}) == 1
        and input.numel() > 0
        and input.shape[0] <= MAX_EXTENT  # what the operator checks
    )
