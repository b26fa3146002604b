"""Deformable RoI pooling: bins [R*P*Q, C] in chunks, channels together, turned to [R, C, P, Q] chunk by chunk."""

from __future__ import annotations

import ctypes
from math import gcd
from typing import Any

from dcnops._backends.launch_plans.layout import (
    ITEMSIZE,
    MAX_BLOCKS,
    SCALAR,
    THREADS,
    VECTOR_BYTES,
    WORKSPACE_BYTES,
    RowRange,
    all_pixels,
    all_rows,
    ceil_div,
    channel_lanes,
    data_macros,
    put_rows,
    row_ranges,
    sum_dtype,
    take_rows,
)
from dcnops._geometry import DeformRoIPoolGeometry, DeformRoIPoolSizes
from dcnops._kernels import Engine

__all__ = ["DeformRoIPoolParams", "deform_roi_pool", "deform_roi_pool_backward"]

_UNIT = "deform_roi_pool"
_pointer = ctypes.c_void_p


class DeformRoIPoolParams(ctypes.Structure):
    """What the kernels of deform_roi_pool.cu take."""

    _fields_ = [
        ("input", _pointer),
        ("rois", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("grad_out", _pointer),
        ("output", _pointer),
        ("grad_offset", _pointer),
        ("grad_mask", _pointer),
        ("grad_input", _pointer),
        ("size", DeformRoIPoolSizes),
        ("range", RowRange),
    ]


def deform_roi_pool(
    engine: Engine,
    geometry: DeformRoIPoolGeometry,
    input: Any,
    rois: Any,
    offset: Any | None,
    mask: Any | None,
    chunk_bytes: int = WORKSPACE_BYTES,
) -> Any:
    """The output [R, C, P, Q] of contiguous arrays.

    `input` may be channels-last; `rois` have the dtype of coordinates.
    """
    g = geometry
    output = engine.empty(g.output_shape, input.dtype)
    sums_dtype = sum_dtype(engine, input.dtype)
    chunk = max(1, chunk_bytes // (g.C * sums_dtype.itemsize))
    bins = engine.empty((min(chunk, g.R * g.bins), g.C), sums_dtype)
    input_rows = all_rows(engine, input, g.N, g.C, g.H * g.W)
    params = DeformRoIPoolParams(
        input=engine.pointer(input_rows),
        rois=engine.pointer(rois),
        offset=engine.pointer(offset),
        mask=engine.pointer(mask),
        output=engine.pointer(bins),
        size=g.params(),
    )
    for rows in row_ranges(g.R, g.bins, chunk):
        params.range = rows
        _launch(engine, g, "deform_roi_pool_forward", input, _offset_like(input, offset, mask), params)
        put_rows(engine, bins, output, g.C, g.bins, rows)
    return output


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
    chunk_bytes: int = WORKSPACE_BYTES,
) -> dict[str, Any]:
    """The gradients named in `needs`, each like its argument, of contiguous arrays.

    `input` and `grad_out` may be channels-last; the input's gradient has the memory order of the input.
    `deterministic` takes the input's gradient without atomic additions, much more slowly.
    """
    g = geometry
    gradients = {}
    if "offset" in needs:
        assert offset is not None
        gradients["offset"] = engine.empty(offset.shape, offset.dtype)
    if "mask" in needs:
        assert mask is not None
        gradients["mask"] = engine.empty(mask.shape, mask.dtype)
    grad_input = None
    if "input" in needs:
        grad_input = engine.zeros((g.N * g.H * g.W, g.C), sum_dtype(engine, input.dtype))
    if not needs:
        return gradients

    chunk = max(1, chunk_bytes // (g.C * ITEMSIZE[str(input.dtype.name)]))
    grad_bins = engine.empty((min(chunk, g.R * g.bins), g.C), input.dtype)
    input_rows = all_rows(engine, input, g.N, g.C, g.H * g.W) if gradients else None
    params = DeformRoIPoolParams(
        input=engine.pointer(input_rows),
        rois=engine.pointer(rois),
        offset=engine.pointer(offset),
        mask=engine.pointer(mask),
        grad_offset=engine.pointer(gradients.get("offset")),
        grad_mask=engine.pointer(gradients.get("mask")),
        grad_input=engine.pointer(grad_input),
        size=g.params(),
    )
    sampling = _offset_like(input, offset, mask)
    for rows in row_ranges(g.R, g.bins, chunk):
        params.range = rows
        part = take_rows(engine, grad_out, g.C, g.bins, rows, grad_bins, copy=True)
        params.grad_out = engine.pointer(part)
        if gradients:
            _launch(engine, g, "deform_roi_pool_grad_bins", input, sampling, params)
        if grad_input is not None and deterministic:
            pixels = g.N * g.H * g.W
            _launch(engine, g, "deform_roi_pool_collect_input", input, sampling, params, pixels)
        elif grad_input is not None:
            _launch(engine, g, "deform_roi_pool_grad_input", input, sampling, params)
    if grad_input is not None:
        gradients["input"] = all_pixels(engine, grad_input, input, g.N, g.C, g.H * g.W)
    return gradients


def _offset_like(input: Any, offset: Any | None, mask: Any | None) -> Any:
    """An array of the dtype of offsets and masks."""
    return next((array for array in (offset, mask) if array is not None), input)


def _launch(
    engine: Engine,
    geometry: DeformRoIPoolGeometry,
    kernel: str,
    input: Any,
    sampling: Any,
    params: DeformRoIPoolParams,
    items: int | None = None,
) -> None:
    """The x dimension of a block runs over channel vectors, y over items: the bins, if no other number is given."""
    dtype = str(input.dtype.name)
    vector = gcd(geometry.C, VECTOR_BYTES // ITEMSIZE[dtype])
    lanes = channel_lanes(geometry.C // vector)
    block = (lanes, THREADS // lanes)
    macros = {**data_macros(dtype), "DCN_OFFSET_SCALAR": SCALAR[str(sampling.dtype.name)], "DCN_VEC": vector}
    grid = min(ceil_div(params.range.rows if items is None else items, block[1]), MAX_BLOCKS)
    engine.launch(_UNIT, kernel, macros, grid, block, params)
