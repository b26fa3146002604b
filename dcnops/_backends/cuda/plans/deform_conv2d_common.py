"""Parts that the plans of deformable convolution share."""

from __future__ import annotations

import ctypes
import functools
from math import gcd
from typing import Any, NamedTuple

from dcnops._backends.cuda.engine import Device, Engine, Launcher
from dcnops._backends.cuda.kernel_constants import MAX_BLOCKS, THREADS, VECTOR_BYTES, WARP, ceil_div
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import (
    ArrayJob,
    RowRange,
    channel_lanes,
    data_macros,
    pixels_to_rows_job,
)
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvGeometry, ImageStrides

sizes_of = functools.lru_cache(maxsize=512)(DeformConvGeometry.params)
"""Cached `DeformConvGeometry.params`; the struct must not be modified."""


class ForwardKey(NamedTuple):
    """Everything that the plan of a forward pass depends on: all but the addresses."""

    geometry: DeformConvGeometry
    dtype: str
    offset_dtype: str
    input_is_rows: bool
    """True if the kernels can read the input in place."""
    offset_strides: ImageStrides
    mask_strides: ImageStrides
    output_last: bool
    """True if the output [N, O, oh, ow] is stored as [N, oh, ow, O]."""
    precision: str
    workspace_bytes: int
    path: str | None

    @property
    def input_copy_bytes(self) -> int:
        """Scratch memory for the channels-last copy of the input."""
        g = self.geometry
        return 0 if self.input_is_rows else g.N * g.H * g.W * g.C * DTYPES[self.dtype].itemsize


class SampleKernels:
    """Kernels of a unit that work on sampling points, for one data dtype and one offset dtype on one device.

    The x dimension of a block runs over the channel vectors of a sampling point, y over sampling points, each of which
    has `sample_bytes` of shared memory.
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
        """Run a kernel on the sampling points of `rows` output pixels, one tile of rows per block."""
        tiles = ceil_div(rows, self.tile_rows) * self._group_taps
        self.launch_blocks(kernel, tiles, self.block, params, self._shared_bytes)

    def launch_blocks(
        self, kernel: str, blocks: int, block: tuple[int, int], params: ctypes.Structure, shared_bytes: int = 0
    ) -> None:
        """Run a kernel that has work for `blocks` blocks; it also completes with fewer."""
        launcher = self._launchers.get(kernel)
        if launcher is None:
            launcher = self._launchers[kernel] = self._engine.kernel(self._unit, kernel, self._macros)
        if blocks:
            launcher(min(blocks, MAX_BLOCKS), block, shared_bytes, params)


def column_sample_bytes(dtype: str) -> int:
    """Return the shared memory per sampling point, in bytes; the column kernel asserts that this is enough."""
    return 40 if dtype == "float64" else 24


def column_kernels(engine: Engine, geometry: DeformConvGeometry, dtype: str, offset_dtype: str) -> SampleKernels:
    """Return the specialised kernel that computes columns."""
    return engine.recall(
        SampleKernels, "deform_conv2d_columns", geometry, dtype, offset_dtype, column_sample_bytes(dtype)
    )


def filters_job(
    engine: Engine, geometry: DeformConvGeometry, weight: Any, filters: Any, round_to_tf32: bool = False
) -> ArrayJob:
    """Return the job that writes weights [O, C/G, kh, kw] to `filters` [O, K, C/G], with channels innermost.

    The weights of 16-bit filters may be float32.
    """
    g = geometry
    rows = RowRange(0, 0, g.O * g.K)
    return pixels_to_rows_job(engine, weight, g.C // g.G, g.K, rows, filters, round_to_tf32)


def input_rows(engine: Engine, key: ForwardKey, input: Any, jobs: list[ArrayJob]) -> tuple[Any, list[ArrayJob]]:
    """Return the rows of the input, and the jobs to run before they are read."""
    if key.input_is_rows:
        return input, jobs
    g = key.geometry
    rows = engine.empty((g.N * g.H * g.W, g.C), input.dtype)
    return rows, [*jobs, pixels_to_rows_job(engine, input, g.C, g.H * g.W, RowRange(0, 0, g.N * g.H * g.W), rows)]


def mebibytes(size: int) -> str:
    """Format a size in bytes for an explanation."""
    return f"{size / 2**20:.1f} MiB"
