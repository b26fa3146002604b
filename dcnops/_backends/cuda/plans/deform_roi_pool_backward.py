"""Backward pass of deformable RoI pooling.

The input is transposed (for the gradients of `offset` and `mask` only), one kernel computes all gradients, and the
gradient of the input is rounded. If it must be deterministic, deform_roi_pool_grad_input.py computes it instead.
"""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.kernel_constants import ROI_BIN_DOTS, VECTOR_BYTES
from dcnops._backends.cuda.plans.array_jobs import as_rows, images_from_rows, is_channels_last, sum_dtype
from dcnops._backends.cuda.plans.deform_roi_pool_common import (
    DeformRoIPoolBins,
    RoIPoolKernels,
    Tiling,
    bins_of,
)
from dcnops._backends.cuda.plans.deform_roi_pool_grad_input import deterministic_grad_input
from dcnops._backends.cuda.workspace import WORKSPACE_BYTES
from dcnops._explain import LOGGER
from dcnops._shapes import DeformRoIPoolGeometry

_UNIT = "deform_roi_pool_backward"


class DeformRoIPoolBackwardParams(ctypes.Structure):
    """Parameters of the kernel of deform_roi_pool_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "grad_out", "grad_offset", "grad_mask", "grad_input")),
        ("bins", DeformRoIPoolBins),
        *((name, ctypes.c_int) for name in ("lane_bits", "tile_bins", "channels_last")),
    ]


def deform_roi_pool_backward(
    engine: Engine,
    geometry: DeformRoIPoolGeometry,
    grad_out: Any,
    input: Any,
    rois: Any,
    offset: Any | None,
    mask: Any | None,
    needs: frozenset[str],
    deterministic: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> dict[str, Any]:
    """Return the gradients named in `needs`, each in the shape and dtype of its argument.

    All arrays are contiguous; `input` and `grad_out` may be channels-last instead, and the gradient of the input has
    the memory order of the input. `deterministic` computes it without atomic additions.

    Scratch memory holds the transpose of the input, if offset or mask gradients need it, and the gradient of the input
    in the dtype of sums. With `deterministic`, it holds the bounds of the regions (20 bytes each) instead of the sums,
    and the transpose of a `grad_out` that is not channels-last. If that transpose exceeds `workspace_bytes`, it is made
    in parts of at least one bin, and the sums are needed after all.
    """
    g = geometry
    kernels = RoIPoolKernels.of(engine, g, input, offset, mask)
    bins = bins_of(engine, g, rois, offset, mask)
    gradients = {
        name: engine.empty(array.shape, array.dtype)
        for name, array in (("offset", offset), ("mask", mask))
        if name in needs and array is not None
    }
    sums = None
    if "input" in needs and not deterministic:
        sums = engine.zeros((g.N * g.H * g.W, g.C), sum_dtype(engine, input.dtype))
    grad_rows = _rows_in_place(engine, g, grad_out)
    if gradients or sums is not None:
        input_rows = as_rows(engine, input, g.N, g.C, g.H * g.W) if gradients else None
        tile_bins, blocks, shared_bytes = backward_tiling(kernels, g).of_regions(g.R)
        if engine.explains:
            LOGGER.debug("deform_roi_pool_backward on %s: %d tiles of %d bins", engine.device, blocks, tile_bins)
        params = DeformRoIPoolBackwardParams(
            input=engine.pointer(input_rows),
            grad_out=engine.pointer(grad_out if grad_rows is None else grad_rows),
            grad_offset=engine.pointer(gradients.get("offset")),
            grad_mask=engine.pointer(gradients.get("mask")),
            grad_input=engine.pointer(sums),
            bins=bins,
            lane_bits=kernels.lane_bits,
            tile_bins=tile_bins,
            channels_last=grad_rows is not None,
        )
        kernels.launch(_UNIT, "deform_roi_pool_backward", blocks, params, shared_bytes)
    if sums is not None:
        gradients["input"] = images_from_rows(engine, sums, input, g.N, g.C, g.H * g.W)
    elif "input" in needs:
        gradients["input"] = deterministic_grad_input(
            engine, g, kernels, bins, grad_out, grad_rows, input, workspace_bytes
        )
    return gradients


def backward_tiling(kernels: RoIPoolKernels, geometry: DeformRoIPoolGeometry) -> Tiling:
    return kernels.tiling(geometry.bins, 1, ROI_BIN_DOTS * kernels.sum_bytes)


def _rows_in_place(engine: Engine, geometry: DeformRoIPoolGeometry, grad_out: Any) -> Any | None:
    """Return the rows [R*P*Q, C] of gradients that are stored that way; None for [R, C, P, Q]."""
    g = geometry
    if is_channels_last(grad_out):
        return as_rows(engine, grad_out, g.R, g.C, g.bins)
    if g.bins == 1 and (engine.pointer(grad_out) or 0) % VECTOR_BYTES == 0:
        return grad_out.reshape(g.R, g.C)
    return None
