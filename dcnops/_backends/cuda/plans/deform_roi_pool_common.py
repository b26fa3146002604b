"""Parts that the plans of deformable RoI pooling share."""

from __future__ import annotations

import ctypes
from math import gcd
from typing import Any, NamedTuple

from dcnops._backends.cuda.engine import Device, Engine, dtype_name
from dcnops._backends.cuda.kernel_constants import (
    MAX_BLOCKS,
    ROI_WARP_PIXELS,
    THREADS,
    VECTOR_BYTES,
    WARP,
    ceil_div,
)
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import channel_lanes, data_macros
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformRoIPoolGeometry, DeformRoIPoolSizes

WARPS = THREADS // WARP
_MAX_TILE_BINS = 56
"""Bins of a tile: with their channels and the memory of the warps they fit 48 KiB of shared memory."""

_ENOUGH_BLOCKS = 512
"""About four blocks for each multiprocessor of a large GPU; tiles shrink until there are as many."""


class DeformRoIPoolBins(ctypes.Structure):
    """Arrays and sizes that determine the bins (`DeformRoIPoolBins` in dcn/roi_bins.cuh)."""

    _fields_ = [*((name, ctypes.c_void_p) for name in ("rois", "offset", "mask")), ("size", DeformRoIPoolSizes)]


class Tiling(NamedTuple):
    """Division of the bins of all regions into tiles, for any number of regions."""

    region_bins: int
    tile_bins: tuple[int, ...]
    """Possible bins of a tile: whole regions or an equal part of one, then smaller ones for few regions."""
    slices: int
    """Blocks that share a tile."""
    block_bytes: int
    """Shared memory of a block, to which each bin of its tile adds `bin_bytes`."""
    bin_bytes: int

    def of_regions(self, regions: int) -> tuple[int, int, int]:
        """Return the bins of a tile, the number of blocks and the shared memory of each.

        The tiles are the largest that make enough blocks, otherwise the smallest.
        """
        for bins in self.tile_bins:
            # `ceil_div`, inlined because the number of regions changes from call to call.
            blocks = -(-regions * self.region_bins // bins) * self.slices
            if blocks >= _ENOUGH_BLOCKS:
                break
        return bins, min(blocks, MAX_BLOCKS), self.block_bytes + bins * self.bin_bytes


class RoIPoolKernels:
    """Kernels of RoI pooling for a number of channels and the dtypes of data and offsets, on one device.

    The lanes of a warp share the channels of a bin. Only the grid of a launch depends on the number of regions.
    """

    def __init__(self, engine: Engine, device: Device, channels: int, dtype: str, offset_dtype: str) -> None:
        self._engine = engine
        self.item_bytes = DTYPES[dtype].itemsize
        self.sum_bytes = max(4, self.item_bytes)
        self.vector = gcd(channels, VECTOR_BYTES // self.item_bytes)
        self.lanes = channel_lanes(channels // self.vector)
        self.lane_bits = self.lanes.bit_length() - 1
        self.slices = ceil_div(channels, self.lanes * self.vector)
        """Parts of the channels, each held by the lanes of a warp."""
        self._macros: Macros = {
            **data_macros(dtype),
            "DCN_OFFSET_SCALAR": DTYPES[offset_dtype].c_name,
            "DCN_VEC": self.vector,
        }

    @classmethod
    def of(
        cls, engine: Engine, geometry: DeformRoIPoolGeometry, input: Any, offset: Any | None, mask: Any | None
    ) -> RoIPoolKernels:
        """Return the kernels of a call."""
        sampling = next((array for array in (offset, mask) if array is not None), input)
        return engine.recall(cls, geometry.C, dtype_name(input.dtype), dtype_name(sampling.dtype))

    def tiling(self, region_bins: int, slices: int, bin_bytes: int = 0) -> Tiling:
        """Return the tiling of a kernel, of which a bin needs `bin_bytes` of shared memory and space for its channels.

        The channels of a bin are padded by a vector.
        """
        block_bytes = WARPS * ROI_WARP_PIXELS * self.sum_bytes
        bin_bytes += (self.lanes + 1) * self.vector * self.item_bytes
        parts = ceil_div(region_bins, _MAX_TILE_BINS)
        sizes = [_MAX_TILE_BINS // region_bins * region_bins if parts == 1 else ceil_div(region_bins, parts)]
        while sizes[-1] > WARPS:
            sizes.append(max(WARPS, ceil_div(sizes[-1], 2)))
        return Tiling(region_bins, tuple(sizes), slices, block_bytes, bin_bytes)

    def launch(self, unit: str, kernel: str, blocks: int, params: ctypes.Structure, shared_bytes: int = 0) -> None:
        """Run a kernel that has work for `blocks` blocks; it also completes with fewer."""
        grid = min(blocks, MAX_BLOCKS)
        self._engine.launch(unit, kernel, self._macros, grid, (WARP, WARPS), params, shared_bytes)


def bins_of(
    engine: Engine, geometry: DeformRoIPoolGeometry, rois: Any, offset: Any | None, mask: Any | None
) -> DeformRoIPoolBins:
    """Return the struct that determines the bins."""
    return DeformRoIPoolBins(*map(engine.pointer, (rois, offset, mask)), geometry.params())
