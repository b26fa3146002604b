"""Deformable RoI pooling on NumPy arrays.

The image is copied to channels-last; threads then take rows of bins, dealt out so that regions of unlike size even
out, and in the input's gradient channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dcnops._backends.cpu import deform_roi_pool_loops as loops
from dcnops._backends.cpu import transpose_loops
from dcnops._backends.cpu.arrays import Array, Staged, empty, plain, rounded, strips, sum_dtype
from dcnops._backends.cpu.threads import PIECES_PER_THREAD, THREADS, parallel
from dcnops._errors import ArgumentError
from dcnops._explain import LOGGER
from dcnops._geometry import DeformRoIPoolGeometry

_CHANNELS_PER_THREAD = 16
_SPAN_BYTES = 2**23


@dataclass(frozen=True)
class _Call:
    """The arguments of both directions as the loops take them."""

    geometry: DeformRoIPoolGeometry
    dtype: np.dtype[Any]
    """The dtype of computation."""
    rois: Array
    """[R, 5]"""
    offset: Array
    """[R, 2, P*Q], or of size 0 for none."""
    mask: Array
    """[R, P*Q], or of size 0 for none."""

    @property
    def placement(self) -> tuple[Any, ...]:
        """What the loops know of the bins: sizes, scale, gamma."""
        g = self.geometry
        return (g.H, g.W, g.P, g.Q, g.sampling_ratio), self.dtype.type(g.spatial_scale), self.dtype.type(g.gamma)

    def list_scratch(self) -> tuple[Array, ...]:
        """What a thread needs to list the pixels of a bin."""
        g = self.geometry
        # A list is filled up to a multiple of four.
        longest = g.H * g.W + 3
        axes = np.zeros((4, max(g.H, g.W)), self.dtype)
        return axes, np.empty(longest, np.int64), np.empty((3, longest), self.dtype)


def deform_roi_pool(
    geometry: DeformRoIPoolGeometry,
    input: Array,
    rois: Array,
    offset: Array | None,
    mask: Array | None,
    channels_last: bool = False,
) -> Array:
    """Deformable RoI pooling; the arguments are those of `dcnops.deform_roi_pool`, checked but for their values.

    With `channels_last` the result [R, C, P, Q] lies in memory as [R, P, Q, C].
    """
    g = geometry
    call = _call(geometry, input, rois, offset, mask)
    out = np.empty((g.R, g.C, g.bins), call.dtype)
    LOGGER.debug("%d rows of bins, %d threads", g.R * g.P, THREADS)
    if g.R:
        parallel(
            loops.pool_bins, g.R * g.P,
            *call.placement, _channels_last(call, input), call.rois, call.offset, call.mask, _order(call, 0, g.R), out,
            scratch=lambda: (*call.list_scratch(), empty((g.Q, g.C), call.dtype)),
        )  # fmt: skip
    result = rounded(out, input.dtype).reshape(g.output_shape)
    return np.ascontiguousarray(result.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) if channels_last else result


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
    """Gradients of `deform_roi_pool` by the name of the argument, those in `needs`; always deterministic."""
    g = geometry
    call = _call(geometry, input, rois, offset, mask)
    nothing = np.empty(0, call.dtype)
    grad_offset = np.empty((g.R, 2, g.bins), call.dtype) if "offset" in needs else nothing.reshape(0, 0, 0)
    grad_mask = np.empty((g.R, g.bins), call.dtype) if "mask" in needs else nothing.reshape(0, 0)
    grad_image = np.zeros((g.N, g.H * g.W + 1, g.C), call.dtype) if "input" in needs else None
    image = _channels_last(call, input) if needs & {"offset", "mask"} else None

    span = max(1, _SPAN_BYTES // (g.bins * g.C * call.dtype.itemsize))
    LOGGER.debug("%d regions in spans of %d, %d threads", g.R, span, THREADS)
    for first in range(0, g.R if needs else 0, span):
        last = min(first + span, g.R)
        part = plain(grad_out[first:last], call.dtype, last - first, g.C, g.bins)
        gradient = empty((last - first, g.bins, g.C), call.dtype)
        parallel(transpose_loops.to_channels_last, strips(last - first, g.bins), part, gradient)
        if image is not None:
            parallel(
                loops.slope_bins, (last - first) * g.P,
                *call.placement, image, call.rois, call.offset, call.mask, _order(call, first, last), first,
                gradient, grad_offset, grad_mask,
                scratch=call.list_scratch,
            )  # fmt: skip
        if grad_image is not None:
            parallel(
                loops.scatter_bins, g.C,
                *call.placement, call.rois, call.offset, call.mask, first, gradient, grad_image,
                scratch=call.list_scratch, pieces_per_thread=1, least=_CHANNELS_PER_THREAD,
            )  # fmt: skip

    results = {}
    if grad_image is not None:
        results["input"] = np.empty(input.shape, input.dtype)
        target = Staged(results["input"], call.dtype)
        parallel(transpose_loops.from_channels_last, strips(g.N, g.H * g.W), grad_image, target.array, 0)
        target.store()
    if "offset" in needs and offset is not None:
        results["offset"] = rounded(grad_offset, offset.dtype).reshape(offset.shape)
    if "mask" in needs and mask is not None:
        results["mask"] = rounded(grad_mask, mask.dtype).reshape(mask.shape)
    return results


def _call(
    geometry: DeformRoIPoolGeometry, input: Array, rois: Array, offset: Array | None, mask: Array | None
) -> _Call:
    g = geometry
    images = rois[:, 0]
    with np.errstate(invalid="ignore"):
        wrong = np.flatnonzero(~((images >= 0) & (images < g.N) & (images == np.floor(images))))
    if len(wrong):
        raise ArgumentError(
            f"rois must hold indices of feature maps from 0 to N-1={g.N - 1} in column 0, "
            f"got {images[wrong[0]]} in row {wrong[0]}"
        )
    dtype = sum_dtype(input)
    with np.errstate(over="ignore"):
        plain_rois = plain(rois, dtype, g.R, 5)
    return _Call(
        geometry,
        dtype,
        plain_rois,
        np.empty((0, 0, 0), dtype) if offset is None else plain(offset, dtype, g.R, 2, g.bins),
        np.empty((0, 0), dtype) if mask is None else plain(mask, dtype, g.R, g.bins),
    )


def _channels_last(call: _Call, input: Array) -> Array:
    """The images [N, H*W + 1, C], with a zero pixel at the end of each."""
    g = call.geometry
    image = empty((g.N, g.H * g.W + 1, g.C), call.dtype)
    image[:, -1] = 0
    source = plain(input, call.dtype, g.N, g.C, g.H * g.W)
    parallel(transpose_loops.to_channels_last, strips(g.N, g.H * g.W), source, image)
    return image


def _order(call: _Call, first: int, last: int) -> Array:
    """Rows of bins ``r * P + p`` of some regions, in an order whose pieces of equal length cost about the same."""
    g = call.geometry
    items = np.arange(first * g.P, last * g.P)
    if g.sampling_ratio:
        return items
    costs = np.empty(g.R, call.dtype)
    parallel(loops.region_costs, g.R, call.placement[0], call.placement[1], call.rois, costs)
    by_cost = items[np.argsort(-costs[items // g.P], kind="stable")]
    pieces = THREADS * PIECES_PER_THREAD
    return np.concatenate([by_cost[piece::pieces] for piece in range(pieces)])
