"""Deformable RoI pooling on NumPy arrays.

The image is copied to channels-last. Each thread processes rows of bins, in an order that balances regions of different
sizes; for the input gradient, each thread processes a range of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dcnops._backends.cpu import deform_roi_pool_loops as loops
from dcnops._backends.cpu.arrays import (
    CHANNELS_PER_THREAD,
    Array,
    StagedResult,
    aligned_empty,
    compute_dtype,
    loop_array,
    rounded,
)
from dcnops._backends.cpu.compiled import quiet
from dcnops._backends.cpu.threads import PIECES_PER_THREAD, parallel
from dcnops._backends.cpu.transpose_loops import from_channels_last, to_channels_last
from dcnops._errors import ArgumentError
from dcnops._explain import LOGGER
from dcnops._shapes import DeformRoIPoolGeometry
from dcnops._threads import threads_of_call

_SPAN_BYTES = 2**23


@dataclass(frozen=True)
class _LoopArguments:
    """Arguments of the forward and backward pass in the form that the loops need."""

    geometry: DeformRoIPoolGeometry
    dtype: np.dtype[Any]  # dtype of computation
    images: Array  # [R] of int64: checked, and not shared with the caller
    rois: Array  # [R, 5], of which the loops read columns 1 to 4
    offset: Array  # [R, 2, P*Q], or an empty array for None
    mask: Array  # [R, P*Q], or an empty array for None

    @property
    def shared(self) -> tuple[Any, ...]:
        """Arguments that all loops share: sizes, scale, gamma and the arrays."""
        g = self.geometry
        sizes = (g.H, g.W, g.P, g.Q, g.sampling_ratio)
        scale, gamma = self.dtype.type(g.spatial_scale), self.dtype.type(g.gamma)
        return sizes, scale, gamma, self.images, self.rois, self.offset, self.mask

    def list_scratch(self) -> tuple[Array, ...]:
        """Return the scratch memory that a thread needs to list the pixels of a bin."""
        g = self.geometry
        # Lists are padded to a multiple of four.
        longest = g.H * g.W + 3
        axes = np.zeros((4, max(g.H, g.W)), self.dtype)
        return axes, np.empty(longest, np.int64), np.empty((3, longest), self.dtype)


@quiet
def deform_roi_pool(
    geometry: DeformRoIPoolGeometry,
    input: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    channels_last: bool = False,
) -> Array:
    """Compute deformable RoI pooling, and check the values of `rois`. See `dcnops.deform_roi_pool`.

    With `channels_last` the result [R, C, P, Q] has the memory order [R, P, Q, C].
    """
    g = geometry
    arguments = _loop_arguments(geometry, input, rois, offset, mask)
    out = np.empty((g.R, g.C, g.bins), arguments.dtype)
    LOGGER.debug("%d rows of bins, %d threads", g.R * g.P, threads_of_call())
    if g.R:
        parallel(
            loops.pool_bins, g.R * g.P,
            *arguments.shared, _channels_last(arguments, input), _balanced_rows(arguments, 0, g.R), out,
            scratch=lambda: (*arguments.list_scratch(), aligned_empty((g.Q, g.C), arguments.dtype)),
        )  # fmt: skip
    result = rounded(out, input.dtype).reshape(g.output_shape)
    return np.ascontiguousarray(result.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if channels_last else result


@quiet
def deform_roi_pool_backward(
    geometry: DeformRoIPoolGeometry,
    grad_out: Array,
    input: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    needs: frozenset[str],
    deterministic: bool,
) -> dict[str, Array]:
    """Compute the gradients in `needs`, by argument name. See `dcnops.deform_roi_pool_backward`."""
    g = geometry
    arguments = _loop_arguments(geometry, input, rois, offset, mask)
    nothing = np.empty(0, arguments.dtype)
    grad_offset = np.empty((g.R, 2, g.bins), arguments.dtype) if "offset" in needs else nothing.reshape(0, 0, 0)
    grad_mask = np.empty((g.R, g.bins), arguments.dtype) if "mask" in needs else nothing.reshape(0, 0)
    grad_image = np.zeros((g.N, g.H * g.W + 1, g.C), arguments.dtype) if "input" in needs else None
    image = _channels_last(arguments, input) if needs & {"offset", "mask"} else None

    span = max(1, _SPAN_BYTES // (g.bins * g.C * arguments.dtype.itemsize))
    LOGGER.debug("%d regions in spans of %d, %d threads", g.R, span, threads_of_call())
    for first in range(0, g.R if needs else 0, span):
        last = min(first + span, g.R)
        part = loop_array(grad_out[first:last], arguments.dtype, last - first, g.C, g.bins)
        gradient = aligned_empty((last - first, g.bins, g.C), arguments.dtype)
        parallel(*to_channels_last(part, gradient))
        if image is not None:
            parallel(
                loops.sampling_gradients, (last - first) * g.P,
                *arguments.shared, image, _balanced_rows(arguments, first, last), first,
                gradient, grad_offset, grad_mask,
                scratch=arguments.list_scratch,
            )  # fmt: skip
        if grad_image is not None:
            parallel(
                loops.scatter_bins, g.C,
                *arguments.shared, first, gradient, grad_image,
                scratch=arguments.list_scratch, pieces_per_thread=1, least=CHANNELS_PER_THREAD,
            )  # fmt: skip

    results = {}
    if grad_image is not None:
        results["input"] = np.empty(input.shape, input.dtype)
        target = StagedResult(results["input"], arguments.dtype)
        parallel(*from_channels_last(grad_image, target.array, 0))
        target.store()
    if "offset" in needs and offset is not None:
        results["offset"] = rounded(grad_offset, offset.dtype).reshape(offset.shape)
    if "mask" in needs and mask is not None:
        results["mask"] = rounded(grad_mask, mask.dtype).reshape(mask.shape)
    return results


def _loop_arguments(
    geometry: DeformRoIPoolGeometry, input: Array, rois: Array, offset: Array | None, mask: Array | None
) -> _LoopArguments:
    g = geometry
    dtype = compute_dtype(input)
    return _LoopArguments(
        geometry,
        dtype,
        _image_indices(g, rois),
        loop_array(rois, dtype, g.R, 5),
        np.empty((0, 0, 0), dtype) if offset is None else loop_array(offset, dtype, g.R, 2, g.bins),
        np.empty((0, 0), dtype) if mask is None else loop_array(mask, dtype, g.R, g.bins),
    )


def _image_indices(geometry: DeformRoIPoolGeometry, rois: Array) -> Array:
    """Return a checked copy of column 0 of the regions.

    The dtype of coordinates cannot hold every index, and the caller's array may change during the call.
    """
    given = rois[:, 0].copy()
    wrong = np.flatnonzero(~((given >= 0) & (given < geometry.N) & (given == np.floor(given))))
    if len(wrong):
        raise ArgumentError(
            f"rois must hold indices of feature maps from 0 to N-1={geometry.N - 1} in column 0, "
            f"got {given[wrong[0]]} in row {wrong[0]}"
        )
    return given.astype(np.int64)


def _channels_last(arguments: _LoopArguments, input: Array) -> Array:
    """Copy the images to [N, H*W + 1, C], with a zero pixel at the end of each image."""
    g = arguments.geometry
    image = aligned_empty((g.N, g.H * g.W + 1, g.C), arguments.dtype)
    image[:, -1] = 0
    source = loop_array(input, arguments.dtype, g.N, g.C, g.H * g.W)
    parallel(*to_channels_last(source, image))
    return image


def _balanced_rows(arguments: _LoopArguments, first: int, last: int) -> Array:
    """Return rows of bins ``r * P + p``, ordered so that pieces of equal length take about the same time."""
    g = arguments.geometry
    items = np.arange(first * g.P, last * g.P)
    if g.sampling_ratio:
        return items
    costs = np.empty(g.R, arguments.dtype)
    sizes, scale, _, _, rois, _, _ = arguments.shared
    parallel(loops.region_costs, g.R, sizes, scale, rois, costs)
    by_cost = items[np.argsort(-costs[items // g.P], kind="stable")]
    pieces = threads_of_call() * PIECES_PER_THREAD
    return np.concatenate([by_cost[piece::pieces] for piece in range(pieces)])
