"""Deformable RoI pooling: one kernel that reads and writes the arrays as they are, around it what is transposed.

Forward: the input's transpose (none where it is channels-last), the pooling. Backward: the input's transpose (only for
the gradients of `offset` and `mask`), zeros, the bins' kernel, the rounding of the input's gradient; with
`deterministic` the transpose of `grad_out`, the regions' bounds and the collection in place of the last three.
"""

from __future__ import annotations

import ctypes
from math import gcd
from typing import Any

from dcnops._backends.cuda.constants import (
    MAX_BLOCKS,
    MAX_ROWS,
    ROI_BIN_DOTS,
    ROI_BOUNDS_INTS,
    ROI_STRIP_PADDING,
    ROI_WARP_PIXELS,
    THREADS,
    VECTOR_BYTES,
    WARP,
    WORKSPACE_BYTES,
    ceil_div,
    roi_strip_pixels,
)
from dcnops._backends.cuda.engine import Engine, Macros
from dcnops._backends.cuda.plans.array_jobs import (
    RowRange,
    as_rows,
    channel_lanes,
    data_macros,
    empty_images,
    images_from_rows,
    is_channels_last,
    pixels_to_rows,
    row_ranges,
    sum_dtype,
)
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformRoIPoolGeometry, DeformRoIPoolSizes

_FORWARD, _BACKWARD, _COLLECT = "deform_roi_pool_forward", "deform_roi_pool_backward", "deform_roi_pool_grad_input"
_WARPS = THREADS // WARP
_BLOCK = (WARP, _WARPS)
_MAX_TILE_ROWS = 56  # with their channels they and what the warps keep fit 48 KiB
_FEW_BLOCKS = 512  # about four for each multiprocessor of a large GPU

_pointer = ctypes.c_void_p
_int = ctypes.c_int


class DeformRoIPoolBins(ctypes.Structure):
    """What says where the bins lie (`DeformRoIPoolBins` in dcn/roi_bins.cuh)."""

    _fields_ = [("rois", _pointer), ("offset", _pointer), ("mask", _pointer), ("size", DeformRoIPoolSizes)]


class DeformRoIPoolForwardParams(ctypes.Structure):
    """What the kernel of deform_roi_pool_forward.cu takes."""

    _fields_ = [
        ("input", _pointer),
        ("output", _pointer),
        ("bins", DeformRoIPoolBins),
        ("lane_bits", _int),
        ("tile_rows", _int),
        ("channels_last", _int),
    ]


class DeformRoIPoolBackwardParams(ctypes.Structure):
    """What the kernel of deform_roi_pool_backward.cu takes."""

    _fields_ = [
        ("input", _pointer),
        ("grad_out", _pointer),
        ("grad_offset", _pointer),
        ("grad_mask", _pointer),
        ("grad_input", _pointer),
        ("bins", DeformRoIPoolBins),
        ("lane_bits", _int),
        ("tile_rows", _int),
        ("channels_last", _int),
    ]


class DeformRoIPoolGradInputParams(ctypes.Structure):
    """What the kernels of deform_roi_pool_grad_input.cu take."""

    _fields_ = [
        ("grad_out", _pointer),
        ("bounds", _pointer),
        ("grad_input", _pointer),
        ("sums", _pointer),
        ("bins", DeformRoIPoolBins),
        ("range", RowRange),
        ("lane_bits", _int),
        ("channels_last", _int),
    ]


def deform_roi_pool(
    engine: Engine,
    geometry: DeformRoIPoolGeometry,
    input: Any,
    rois: Any,
    offset: Any | None,
    mask: Any | None,
    channels_last: bool = False,
) -> Any:
    """The output [R, C, P, Q] of contiguous arrays.

    `input` may be channels-last; `rois` have the dtype of coordinates. With `channels_last` the output lies in memory
    as [R, P, Q, C]. Scratch memory: the transpose of an `input` that is not channels-last.
    """
    g = geometry
    call = _Call(engine, g, input, rois, offset, mask)
    if channels_last:
        output = engine.empty((g.R, g.P, g.Q, g.C), input.dtype).transpose(0, 3, 1, 2)
    else:
        output = engine.empty(g.output_shape, input.dtype)
    input_rows = as_rows(engine, input, g.N, g.C, g.H * g.W)
    tile_rows = call.tile_rows(call.slices)
    params = DeformRoIPoolForwardParams(
        input=engine.pointer(input_rows),
        output=engine.pointer(output),
        bins=call.bins,
        lane_bits=call.lanes.bit_length() - 1,
        tile_rows=tile_rows,
        # Of one bin, both orders are the same.
        channels_last=channels_last or g.bins == 1,
    )
    shared_bytes = _WARPS * ROI_WARP_PIXELS * call.sum_bytes + call.tile_bytes(tile_rows)
    tiles = ceil_div(g.R * g.bins, tile_rows) * call.slices
    call.launch(_FORWARD, "deform_roi_pool_forward", tiles, params, shared_bytes)
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
    `deterministic` takes the input's gradient without atomic additions.

    Scratch memory: the input's transpose where offset or mask gradients need it, and the sums of the input's gradient
    in the dtype of coordinates. With `deterministic` there are no sums, but the regions' bounds (20 bytes each), and
    `chunk_bytes` of `grad_out` (or one bin's) unless that is channels-last; a larger `grad_out` is taken in parts, with
    sums.
    """
    g = geometry
    call = _Call(engine, g, input, rois, offset, mask)
    gradients: dict[str, Any] = {}
    if "offset" in needs:
        assert offset is not None
        gradients["offset"] = engine.empty(offset.shape, offset.dtype)
    if "mask" in needs:
        assert mask is not None
        gradients["mask"] = engine.empty(mask.shape, mask.dtype)
    sums = None
    if "input" in needs and not deterministic:
        sums = engine.zeros((g.N * g.H * g.W, g.C), sum_dtype(engine, input.dtype))

    grad_rows = _rows_in_place(engine, g, grad_out)
    input_rows = as_rows(engine, input, g.N, g.C, g.H * g.W) if gradients else None
    if gradients or sums is not None:
        tile_rows = call.tile_rows(1)
        params = DeformRoIPoolBackwardParams(
            input=engine.pointer(input_rows),
            grad_out=engine.pointer(grad_out if grad_rows is None else grad_rows),
            grad_offset=engine.pointer(gradients.get("offset")),
            grad_mask=engine.pointer(gradients.get("mask")),
            grad_input=engine.pointer(sums),
            bins=call.bins,
            lane_bits=call.lanes.bit_length() - 1,
            tile_rows=tile_rows,
            channels_last=grad_rows is not None,
        )
        shared = (_WARPS * ROI_WARP_PIXELS + tile_rows * ROI_BIN_DOTS) * call.sum_bytes + call.tile_bytes(tile_rows)
        call.launch(_BACKWARD, "deform_roi_pool_backward", ceil_div(g.R * g.bins, tile_rows), params, shared)
    if sums is not None:
        gradients["input"] = images_from_rows(engine, sums, input, g.N, g.C, g.H * g.W)
    elif "input" in needs:
        gradients["input"] = _collect_input(call, grad_out, grad_rows, input, chunk_bytes)
    return gradients


def _collect_input(call: _Call, grad_out: Any, grad_rows: Any | None, input: Any, chunk_bytes: int) -> Any:
    """The input's gradient, the same in every run; `grad_rows` is `grad_out` as rows, where it is that already."""
    engine, g = call.engine, call.geometry
    chunk = MAX_ROWS
    if grad_rows is None:
        chunk = min(chunk, max(1, chunk_bytes // (g.C * call.item_bytes)))
    ranges = list(row_ranges(g.R, g.bins, chunk)) or [RowRange(0, 0, 0)]
    whole = len(ranges) == 1
    # In one part the sums are complete, and written as they shall be.
    gradient = empty_images(engine, input.shape, input.dtype, input) if whole else None
    sums = None if whole else engine.zeros((g.N * g.H * g.W, g.C), sum_dtype(engine, input.dtype))
    scratch = engine.empty((ranges[0].rows, g.C), input.dtype) if grad_rows is None else None
    bounds = engine.empty((g.R, ROI_BOUNDS_INTS), "int32")
    params = DeformRoIPoolGradInputParams(
        bounds=engine.pointer(bounds),
        grad_input=engine.pointer(gradient),
        sums=engine.pointer(sums),
        bins=call.bins,
        lane_bits=call.lanes.bit_length() - 1,
        channels_last=is_channels_last(input),
    )
    call.launch(_COLLECT, "deform_roi_pool_region_bounds", ceil_div(g.R, _WARPS), params)
    strip = roi_strip_pixels(call.sum_bytes, call.vector)
    strips = g.N * g.H * ceil_div(g.W, strip) * call.slices
    shared_bytes = _WARPS * strip * (WARP * call.vector + ROI_STRIP_PADDING) * call.sum_bytes
    first = 0
    for rows in ranges:
        part = scratch if grad_rows is None else grad_rows[first:]
        if grad_rows is None and rows.rows:
            pixels_to_rows(engine, grad_out, g.C, g.bins, rows, scratch)
        params.range = rows
        params.grad_out = engine.pointer(part)
        call.launch(_COLLECT, "deform_roi_pool_grad_input", strips, params, shared_bytes)
        first += rows.rows
    return gradient if whole else images_from_rows(engine, sums, input, g.N, g.C, g.H * g.W)


def _rows_in_place(engine: Engine, geometry: DeformRoIPoolGeometry, grad_out: Any) -> Any | None:
    """Rows [R*P*Q, C] of gradients that lie so in memory; None for [R, C, P, Q]."""
    g = geometry
    if is_channels_last(grad_out):
        return as_rows(engine, grad_out, g.R, g.C, g.bins)
    if g.bins == 1 and (engine.pointer(grad_out) or 0) % VECTOR_BYTES == 0:
        return grad_out.reshape(g.R, g.C)
    return None


class _Call:
    """What the launches of one call share: where the bins lie, and how channels are spread over the lanes of a warp."""

    def __init__(
        self,
        engine: Engine,
        geometry: DeformRoIPoolGeometry,
        input: Any,
        rois: Any,
        offset: Any | None,
        mask: Any | None,
    ) -> None:
        dtype = str(input.dtype.name)
        sampling = next((array for array in (offset, mask) if array is not None), input)
        self.engine = engine
        self.geometry = geometry
        self.item_bytes = DTYPES[dtype].itemsize
        self.sum_bytes = sum_dtype(engine, input.dtype).itemsize
        self.vector = gcd(geometry.C, VECTOR_BYTES // self.item_bytes)
        self.lanes = channel_lanes(geometry.C // self.vector)
        self.slices = ceil_div(geometry.C, self.lanes * self.vector)
        self.bins = DeformRoIPoolBins(
            engine.pointer(rois), engine.pointer(offset), engine.pointer(mask), geometry.params()
        )
        self._macros: Macros = {
            **data_macros(dtype),
            "DCN_OFFSET_SCALAR": DTYPES[str(sampling.dtype.name)].c_name,
            "DCN_VEC": self.vector,
        }

    def tile_rows(self, slices: int) -> int:
        """Bins of a tile: whole regions, or an equal part of one, but fewer where few blocks would have work."""
        g = self.geometry
        parts = ceil_div(g.bins, _MAX_TILE_ROWS)
        rows = _MAX_TILE_ROWS // g.bins * g.bins if parts == 1 else ceil_div(g.bins, parts)
        while rows > _WARPS and ceil_div(g.R * g.bins, rows) * slices < _FEW_BLOCKS:
            rows = max(_WARPS, ceil_div(rows, 2))
        return rows

    def tile_bytes(self, tile_rows: int) -> int:
        """Shared memory of a tile of bins; its rows are padded by a vector."""
        return tile_rows * (self.lanes + 1) * self.vector * self.item_bytes

    def launch(self, unit: str, kernel: str, blocks: int, params: ctypes.Structure, shared_bytes: int = 0) -> None:
        self.engine.launch(unit, kernel, self._macros, min(blocks, MAX_BLOCKS), _BLOCK, params, shared_bytes)
