"""Forward pass of deformable convolution in one fused kernel (implicit GEMM): no columns in memory."""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.heuristics import ForwardProblem, FusedTiles, choose_splits, choose_tiles
from dcnops._backends.cuda.kernel_constants import FUSED_SLICE_OUTPUTS, MAX_BLOCKS, THREADS, VECTOR_BYTES
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import ArrayJob, run_array_jobs
from dcnops._backends.cuda.plans.deform_conv2d_common import ForwardKey, input_rows, mebibytes, sizes_of
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvSizes

_ARRAYS = ("input", "offset", "mask", "filters", "bias", "output", "partial")
_NUMBERS = ("O", "rows", "group_outputs", "group_channels", "segment", "steps", "splits", "channels_last")


class DeformConvFusedParams(ctypes.Structure):
    """Parameters of the kernels of deform_conv2d_fused.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _ARRAYS),
        ("size", DeformConvSizes),
        *((name, ctypes.c_int) for name in _NUMBERS),
    ]


class FusedPlan:
    """Launch plan of a group of images: the fused kernel, and one that adds up the partial sums of split-K."""

    def __init__(self, engine: Engine, device: Device, key: ForwardKey) -> None:
        g = key.geometry
        problem = ForwardProblem(g, key.dtype, key.precision, device)
        tiles = choose_tiles(problem)
        splits = choose_splits(problem, tiles, key.workspace_bytes - key.input_copy_bytes)
        self.rounds_filters = tiles.rounds_filters
        self._engine, self._key, self._tiles, self._splits = engine, key, tiles, splits
        self._partial_shape = (splits, g.N * g.pixels, g.O) if splits > 1 else None
        self._numbers = (
            sizes_of(g, key.offset_strides, key.mask_strides),
            g.O,
            g.N * g.pixels,
            g.O // g.G,
            g.C // g.G,
            problem.segment,
            problem.steps,
            splits,
            key.output_last,
        )
        unit, macros = "deform_conv2d_fused", fused_macros(key.dtype, key.offset_dtype, tiles)
        kernels = {unit: (problem.blocks(tiles.outputs) * splits, tiles.threads)}
        if splits > 1:
            kernels["deform_conv2d_add_splits"] = problem.blocks(FUSED_SLICE_OUTPUTS), THREADS
        self._launches = [
            (engine.kernel(unit, kernel, macros), min(blocks, MAX_BLOCKS), (threads, 1))
            for kernel, (blocks, threads) in kernels.items()
        ]

    def __str__(self) -> str:
        g, tiles = self._key.geometry, self._tiles
        partial = 4 * self._splits * g.N * g.pixels * g.O if self._splits > 1 else 0
        return (
            f"{g.N} images by {tiles.product} ({tiles.suffix}) in tiles of {tiles.outputs} outputs, "
            f"splits of the sums: {self._splits}, scratch memory {mebibytes(self._key.input_copy_bytes + partial)}"
        )

    def run(
        self, input: Any, offset: Any, mask: Any, output: Any, filters: Any, bias: Any, jobs: list[ArrayJob]
    ) -> None:
        """Compute `output`; run `jobs` before anything else."""
        engine, key = self._engine, self._key
        rows_of_input, jobs = input_rows(engine, key, input, jobs)
        run_array_jobs(engine, key.dtype, jobs)
        partial = None if self._partial_shape is None else engine.empty(self._partial_shape, engine.xp.float32)
        arrays = rows_of_input, offset, mask, filters, bias, output, partial
        params = DeformConvFusedParams(*map(engine.pointer, arrays), *self._numbers)
        for launch, blocks, block in self._launches:
            launch(blocks, block, self._tiles.shared_bytes, params)


def fused_macros(dtype: str, offset_dtype: str, tiles: FusedTiles) -> Macros:
    """Return the macros of unit deform_conv2d_fused."""
    return {
        "DCN_SUFFIX": tiles.suffix,
        "DCN_SCALAR": DTYPES[dtype].c_name,
        "DCN_OFFSET_SCALAR": DTYPES[offset_dtype].c_name,
        "DCN_VEC": VECTOR_BYTES // DTYPES[dtype].itemsize,
        "DCN_PRODUCT": tiles.product,
        "DCN_OUTPUTS": tiles.outputs,
        "DCN_BLOCKS": tiles.blocks,
        "DCN_SHARED_BYTES": tiles.shared_bytes,
        **({"DCN_ARCHITECTURE": "90a"} if tiles.by_warpgroups else {}),
    }
