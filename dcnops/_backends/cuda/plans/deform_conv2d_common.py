"""What the plans of both directions of deformable convolution share."""

from __future__ import annotations

import ctypes
import functools
from math import gcd
from typing import Any

from dcnops._backends.cuda.constants import MAX_BLOCKS, THREADS, VECTOR_BYTES, WARP, ceil_div
from dcnops._backends.cuda.engine import Device, Engine, Launcher, Macros
from dcnops._backends.cuda.plans.array_jobs import (
    ArrayJob,
    RowRange,
    channel_lanes,
    data_macros,
    is_channels_last,
    pixels_to_rows_job,
)
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformConvGeometry, DeformConvSizes


def column_sample_bytes(dtype: str) -> int:
    """Shared memory per sampling point of the kernel that makes columns, in bytes; it asserts that it is enough."""
    return 40 if dtype == "float64" else 24


class SampleKernels:
    """The kernels of a unit that work on sampling points, for one kind of data and offsets on one device.

    The x dimension of a block runs over the channel vectors of a sampling point, y over sampling points.

    Parameters
    ----------
    sample_bytes : int
        Shared memory per sampling point.
    """

    def __init__(
        self,
        engine: Engine,
        device: Device,
        unit: str,
        geometry: DeformConvGeometry,
        dtype: str,
        offset_dtype: str,
        sample_bytes: int,
    ) -> None:
        g = geometry
        vector = gcd(g.C // g.D, g.C // g.G, VECTOR_BYTES // DTYPES[dtype].itemsize)
        lanes = channel_lanes(g.C // g.D // vector)
        self._engine, self._unit = engine, unit
        self._group_taps = g.D * g.K
        self._launchers: dict[str, Launcher] = {}
        self._macros: Macros = {
            **data_macros(dtype),
            "DCN_OFFSET_SCALAR": DTYPES[offset_dtype].c_name,
            "DCN_VEC": vector,
            "DCN_SAMPLE_BYTES": sample_bytes,
        }
        self.block = (lanes, THREADS // lanes)
        self.tile_rows = max(WARP, self.block[1])
        self._shared_bytes = self.tile_rows * sample_bytes

    def launch(self, kernel: str, params: ctypes.Structure, rows: int) -> None:
        """Run a kernel on the sampling points of so many rows, a tile of rows per block."""
        tiles = ceil_div(rows, self.tile_rows) * self._group_taps
        self.launch_blocks(kernel, tiles, self.block, params, self._shared_bytes)

    def launch_blocks(
        self, kernel: str, blocks: int, block: tuple[int, int], params: ctypes.Structure, shared_bytes: int = 0
    ) -> None:
        """Run a kernel on so many blocks; it can do with fewer."""
        launcher = self._launchers.get(kernel)
        if launcher is None:
            launcher = self._launchers[kernel] = self._engine.kernel(self._unit, kernel, self._macros)
        if blocks:
            launcher(min(blocks, MAX_BLOCKS), block, shared_bytes, params)


def sizes_of(geometry: DeformConvGeometry, offset: Any, mask: Any | None) -> DeformConvSizes:
    """The struct the kernels take, for offsets and masks in either memory order; not to be changed."""
    return _sizes(geometry, is_channels_last(offset), mask is not None and is_channels_last(mask))


_sizes = functools.lru_cache(maxsize=512)(DeformConvGeometry.params)


def filters_job(
    engine: Engine, geometry: DeformConvGeometry, weight: Any, filters: Any, round_to_tf32: bool = False
) -> ArrayJob:
    """Write weights [O, C/G, kh, kw] to `filters` [O, K, C/G], channels innermost as in the columns."""
    g = geometry
    rows = RowRange(0, 0, g.O * g.K)
    return pixels_to_rows_job(engine, weight, g.C // g.G, g.K, rows, filters, round_to_tf32)
