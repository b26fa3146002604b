"""Deterministic gradient of the input of deformable RoI pooling: each pixel gathers the contributions of the bins."""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.kernel_constants import (
    MAX_ROWS,
    ROI_BOUNDS_INTS,
    STRIP_PADDING,
    WARP,
    ceil_div,
    strip_pixels,
)
from dcnops._backends.cuda.plans.array_jobs import (
    RowRange,
    empty_images,
    images_from_rows,
    is_channels_last,
    pixels_to_rows,
    row_ranges,
    sum_dtype,
)
from dcnops._backends.cuda.plans.deform_roi_pool_common import WARPS, DeformRoIPoolBins, RoIPoolKernels
from dcnops._explain import LOGGER
from dcnops._shapes import DeformRoIPoolGeometry

_UNIT = "deform_roi_pool_grad_input"


class DeformRoIPoolGradInputParams(ctypes.Structure):
    """Parameters of the kernels of deform_roi_pool_grad_input.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "bounds", "grad_input", "sums")),
        ("bins", DeformRoIPoolBins),
        ("range", RowRange),
        ("lane_bits", ctypes.c_int),
        ("channels_last", ctypes.c_int),
    ]


def deterministic_grad_input(
    engine: Engine,
    geometry: DeformRoIPoolGeometry,
    kernels: RoIPoolKernels,
    bins: DeformRoIPoolBins,
    grad_out: Any,
    grad_rows: Any | None,
    input: Any,
    workspace_bytes: int,
) -> Any:
    """Return the gradient of the input, summed in a fixed order.

    `grad_rows` is `grad_out` as rows, or None if it must be transposed, in parts that fit `workspace_bytes`.
    """
    g = geometry
    chunk = MAX_ROWS
    if grad_rows is None:
        chunk = min(chunk, max(1, workspace_bytes // (g.C * kernels.item_bytes)))
    ranges = list(row_ranges(g.R, g.bins, chunk)) or [RowRange(0, 0, 0)]
    is_whole = len(ranges) == 1
    if engine.explains:
        LOGGER.debug("gradient of the input collected by pixel, from %d parts of the gradient", len(ranges))
    # The sums of a single part are final: they are written directly in the dtype and memory order of the input.
    gradient = empty_images(engine, input.shape, input.dtype, input) if is_whole else None
    sums = None if is_whole else engine.zeros((g.N * g.H * g.W, g.C), sum_dtype(engine, input.dtype))
    scratch = engine.empty((ranges[0].rows, g.C), input.dtype) if grad_rows is None else None
    bounds = engine.empty((g.R, ROI_BOUNDS_INTS), "int32")
    params = DeformRoIPoolGradInputParams(
        bounds=engine.pointer(bounds),
        grad_input=engine.pointer(gradient),
        sums=engine.pointer(sums),
        bins=bins,
        lane_bits=kernels.lane_bits,
        channels_last=is_channels_last(input),
    )
    kernels.launch(_UNIT, "deform_roi_pool_region_bounds", ceil_div(g.R, WARPS), params)
    strip = strip_pixels(kernels.sum_bytes, kernels.vector)
    strips = g.N * g.H * ceil_div(g.W, strip) * kernels.slices
    shared_bytes = WARPS * strip * (WARP * kernels.vector + STRIP_PADDING) * kernels.sum_bytes
    first = 0
    for rows in ranges:
        if grad_rows is None and rows.rows:
            pixels_to_rows(engine, grad_out, g.C, g.bins, rows, scratch)
        params.range = rows
        params.grad_out = engine.pointer(scratch if grad_rows is None else grad_rows[first:])
        kernels.launch(_UNIT, "deform_roi_pool_grad_input", strips, params, shared_bytes)
        first += rows.rows
    return gradient if is_whole else images_from_rows(engine, sums, input, g.N, g.C, g.H * g.W)
