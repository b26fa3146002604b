"""Forward pass of deformable RoI pooling: the transpose of an input that is not channels-last, then one kernel."""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.array_jobs import as_rows
from dcnops._backends.cuda.plans.deform_roi_pool_common import (
    DeformRoIPoolBins,
    RoIPoolKernels,
    Tiling,
    bins_of,
)
from dcnops._explain import LOGGER
from dcnops._shapes import DeformRoIPoolGeometry

_UNIT = "deform_roi_pool_forward"


class DeformRoIPoolForwardParams(ctypes.Structure):
    """Parameters of the kernel of deform_roi_pool_forward.cu."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("bins", DeformRoIPoolBins),
        *((name, ctypes.c_int) for name in ("lane_bits", "tile_bins", "channels_last")),
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
    """Return the output [R, C, P, Q]; with `channels_last` it is stored as [R, P, Q, C].

    All arrays are contiguous; `input` may be channels-last instead. `rois` have the dtype of coordinates. Scratch
    memory: the transpose of an `input` that is not channels-last.
    """
    g = geometry
    kernels = RoIPoolKernels.of(engine, g, input, offset, mask)
    if channels_last:
        output = engine.empty((g.R, g.P, g.Q, g.C), input.dtype).transpose(0, 3, 1, 2)
    else:
        output = engine.empty(g.output_shape, input.dtype)
    tile_bins, blocks, shared_bytes = forward_tiling(kernels, g).of_regions(g.R)
    if engine.explains:
        LOGGER.debug("deform_roi_pool on %s: %d tiles of %d bins", engine.device, blocks, tile_bins)
    input_rows = as_rows(engine, input, g.N, g.C, g.H * g.W)
    params = DeformRoIPoolForwardParams(
        input=engine.pointer(input_rows),
        output=engine.pointer(output),
        bins=bins_of(engine, g, rois, offset, mask),
        lane_bits=kernels.lane_bits,
        tile_bins=tile_bins,
        # With one bin, both orders are the same.
        channels_last=channels_last or g.bins == 1,
    )
    kernels.launch(_UNIT, "deform_roi_pool_forward", blocks, params, shared_bytes)
    return output


def forward_tiling(kernels: RoIPoolKernels, geometry: DeformRoIPoolGeometry) -> Tiling:
    return kernels.tiling(geometry.bins, kernels.slices)
