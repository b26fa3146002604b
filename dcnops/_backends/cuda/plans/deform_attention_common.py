"""Parts that the plans of multi-scale deformable attention and deformable aggregation share.

Aggregation is attention with one level, a group per head and an output pixel per query. Its taps have positions of
their own, which the kernels compute from offsets instead of locations.
"""

from __future__ import annotations

import ctypes
from math import gcd
from typing import Any, NamedTuple

from dcnops._arguments import MAX_LEVELS
from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda.engine import Device, Engine, dtype_name
from dcnops._backends.cuda.kernel_constants import (
    ATTENTION_LEVEL_BYTES,
    ATTENTION_POINTS_PER_LANE,
    MAX_BLOCKS,
    THREADS,
    VECTOR_BYTES,
    WARP,
    attention_point_bytes,
    ceil_div,
)
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import channel_lanes, data_macros
from dcnops._dtypes import DTYPES

WARPS = THREADS // WARP

_ENOUGH_THREADS = 1024
"""Threads per multiprocessor, half of what one holds; with fewer, the points of a row are divided among more lanes."""

LEVELS_BYTES = MAX_LEVELS * ATTENTION_LEVEL_BYTES
"""Shared memory of a block for the levels."""


class LevelShape(ctypes.Structure):
    """A level (`LevelShape` in dcn/deform_attention.cuh)."""

    _fields_ = [(name, ctypes.c_int) for name in ("H", "W", "points")]


class TapGrid(ctypes.Structure):
    """The kernel of an aggregation (`TapGrid` in dcn/deform_attention.cuh)."""

    _fields_ = [
        *((name, ctypes.c_int) for name in ("kh", "kw", "sh", "sw", "ph", "pw", "dh", "dw", "ow", "remove_center")),
        ("scale", ctypes.c_double),
    ]


class PointStrides(ctypes.Structure):
    """Strides of locations and weights (`PointStrides` in dcn/deform_attention.cuh)."""

    _fields_ = [(name, ctypes.c_int) for name in ("location_query", "location_head", "weight_query", "weight_head")]


class DeformAttentionPoints(ctypes.Structure):
    """Arrays and sizes that determine the sampling points (`DeformAttentionPoints` in dcn/deform_attention.cuh)."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("locations", "weights", "shapes")),
        ("stride", PointStrides),
        *((name, ctypes.c_int) for name in ("N", "S", "M", "D", "Lq", "L", "K", "has_long_shapes")),
        ("taps", TapGrid),
        ("levels", LevelShape * MAX_LEVELS),
    ]

    @property
    def rows(self) -> int:
        """Number of (image, query, head)."""
        return int(self.N * self.Lq * self.M)


class RowLanes(ctypes.Structure):
    """Division of the lanes of a warp among rows (`RowLanes` in dcn/deform_attention.cuh)."""

    _fields_ = [("lane_bits", ctypes.c_int), ("row_bits", ctypes.c_int)]


class Rows(NamedTuple):
    """Launch of a kernel that runs over rows."""

    lanes: RowLanes
    blocks: int


class AttentionKernels:
    """Kernels for a number of channels per head and the dtypes of values and sampling arrays, on one device."""

    def __init__(
        self, engine: Engine, device: Device, channels: int, dtype: str, sampling_dtype: str, vector: int
    ) -> None:
        self._engine = engine
        self._enough_lanes = device.multiprocessors * _ENOUGH_THREADS
        self.sum_bytes = max(4, DTYPES[dtype].itemsize)
        self.vector = vector
        self.lanes = channel_lanes(channels // vector)
        self.lane_bits = self.lanes.bit_length() - 1
        self.slices = ceil_div(channels, self.lanes * vector)
        """Parts of the channels, each held by the lanes of a row."""
        self._macros: Macros = {
            **data_macros(dtype),
            "DCN_OFFSET_SCALAR": DTYPES[sampling_dtype].c_name,
            "DCN_VEC": vector,
        }

    @classmethod
    def of(cls, engine: Engine, channels: int, locations: Any, *values: Any) -> AttentionKernels:
        """Return the kernels for values with that many channels per head, which they read in vectors."""
        dtype = values[0].dtype
        vector = gcd(channels, VECTOR_BYTES // dtype.itemsize)
        for array in values:
            vector = gcd(vector, (engine.pointer(array) or 0) // dtype.itemsize)
        return engine.recall(cls, channels, dtype_name(dtype), dtype_name(locations.dtype), vector)

    def rows(self, rows: int, points: int, slices: int) -> Rows:
        """Divide `rows` of so many `points` among warps; blocks share the slices of a row."""
        lanes = self.lanes
        while lanes < WARP and lanes // self.lanes < points and rows * lanes < self._enough_lanes:
            lanes *= 2
        warps = ceil_div(rows, WARP // lanes) * slices
        return Rows(RowLanes(self.lane_bits, lanes.bit_length() - 1), ceil_div(warps, WARPS))

    def shared_bytes(self, with_dots: bool = False) -> int:
        """Return the shared memory of a block for the levels and the points that its warps prepare together."""
        point = attention_point_bytes(self.sum_bytes) + (4 * self.sum_bytes if with_dots else 0)
        return LEVELS_BYTES + THREADS * ATTENTION_POINTS_PER_LANE * point

    def launch(self, unit: str, kernel: str, blocks: int, params: ctypes.Structure, shared_bytes: int) -> None:
        """Run a kernel that has work for `blocks` blocks; it also completes with fewer."""
        grid = min(blocks, MAX_BLOCKS)
        self._engine.launch(unit, kernel, self._macros, grid, (WARP, WARPS), params, shared_bytes)


def attention_points(
    engine: Engine,
    geometry: MSDeformAttnGeometry,
    spatial_shapes: Any | None,
    sampling_locations: Any,
    attention_weights: Any,
) -> DeformAttentionPoints:
    """Return the struct that determines the sampling points of an attention."""
    g = geometry
    shapes = g.shapes or ((0, 0),) * g.L
    levels = (LevelShape(*shape, points) for shape, points in zip(shapes, g.points))
    return DeformAttentionPoints(
        *map(engine.pointer, (sampling_locations, attention_weights, spatial_shapes)),
        PointStrides(2 * g.M * g.K, 2 * g.K, g.M * g.K, g.K),
        *(g.N, g.S, g.M, g.D, g.Lq, g.L, g.K),
        spatial_shapes is not None and spatial_shapes.dtype.itemsize == 8,
        levels=(LevelShape * MAX_LEVELS)(*levels),
    )


def aggregation_points(
    engine: Engine, geometry: DeformAggregateGeometry, offset: Any, mask: Any | None
) -> DeformAttentionPoints:
    """Return the struct that determines the sampling points of an aggregation."""
    g = geometry
    if mask is None:
        channels = offset.shape[3]
        stride = PointStrides(channels, 3 * g.K, channels, 3 * g.K)
    else:
        stride = PointStrides(2 * g.G * g.K, 2 * g.K, g.G * g.K, g.K)
    return DeformAttentionPoints(
        engine.pointer(offset),
        engine.pointer(weights_of(g, offset, mask)),
        None,
        stride,
        *(g.N, g.H * g.W, g.G, g.D, g.oh * g.ow, 1, g.K, 0),
        TapGrid(g.kh, g.kw, g.sh, g.sw, g.ph, g.pw, g.dh, g.dw, g.ow, g.remove_center, g.offset_scale),
        (LevelShape * MAX_LEVELS)(LevelShape(g.H, g.W, g.K)),
    )


def weights_of(geometry: DeformAggregateGeometry, offset: Any, mask: Any | None) -> Any:
    """Return the array that begins with the weight of the first tap: the mask, or the end of the packed array."""
    return offset.reshape(-1)[2 * geometry.K :] if mask is None else mask
