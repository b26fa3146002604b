"""Forward pass of deformable convolution through columns [rows, G, K, C/G] (im2col) and cuBLAS."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from dcnops._backends.cuda.engine import Device, Engine
from dcnops._backends.cuda.plans.array_jobs import ArrayJob, RowRange, fill_job, first_row, row_ranges, run_array_jobs
from dcnops._backends.cuda.plans.deform_conv2d_common import (
    ForwardKey,
    column_kernels,
    input_rows,
    mebibytes,
    sizes_of,
)
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvGeometry, DeformConvSizes


class DeformConvColumnsParams(ctypes.Structure):
    """Parameters of the kernel of deform_conv2d_columns.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input", "offset", "mask", "columns")),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("tile_rows", ctypes.c_int),
    ]


class ColumnsPlan:
    """Launch plan of a group of images: chunks of columns, each multiplied by the filters."""

    rounds_filters = False

    def __init__(self, engine: Engine, device: Device, key: ForwardKey) -> None:
        g = key.geometry
        row_bytes = g.K * g.C * DTYPES[key.dtype].itemsize
        workspace = key.workspace_bytes
        max_rows = max(1, max(workspace - key.input_copy_bytes, workspace // 2) // row_bytes)
        self._engine, self._key = engine, key
        self._shape = (min(max_rows, g.N * g.pixels), g.G, g.K * g.C // g.G)
        self._sizes = sizes_of(g, key.offset_strides, key.mask_strides)
        self._chunks = tuple(_chunks(g, max_rows, key.output_last))
        self._kernels = column_kernels(engine, g, key.dtype, key.offset_dtype)
        self._scratch_bytes = key.input_copy_bytes + self._shape[0] * row_bytes

    def __str__(self) -> str:
        g = self._key.geometry
        return (
            f"{g.N} images, chunks: {len(self._chunks)} of at most {self._shape[0]} rows of columns, "
            f"scratch memory {mebibytes(self._scratch_bytes)}"
        )

    def run(
        self, input: Any, offset: Any, mask: Any, output: Any, filters: Any, bias: Any, jobs: list[ArrayJob]
    ) -> None:
        """Compute `output`; run `jobs` before anything else."""
        engine, key, g = self._engine, self._key, self._key.geometry
        rows_of_input, jobs = input_rows(engine, key, input, jobs)
        if bias is not None:
            jobs = [*jobs, fill_job(engine, bias, output, g.N, g.O, g.pixels)]
        run_array_jobs(engine, key.dtype, jobs)
        columns = engine.empty(self._shape, input.dtype)
        pointers = map(engine.pointer, (rows_of_input, offset, mask, columns))
        params = DeformConvColumnsParams(*pointers, self._sizes, tile_rows=self._kernels.tile_rows)
        filters = filters.reshape(g.G, g.O // g.G, g.K * g.C // g.G)
        with engine.products() as matmul:
            for rows in self._chunks:
                params.range = rows
                self._kernels.launch("deform_conv2d_columns", params, rows.rows)
                self._multiply(matmul, columns[: rows.rows], filters, output, rows, bias is not None)

    def _multiply(
        self, matmul: Callable[..., None], columns: Any, filters: Any, output: Any, rows: RowRange, accumulate: bool
    ) -> None:
        """Compute the output of `rows` (+)= columns [rows, G, K*C/G] times filters, in place."""
        g, precision = self._key.geometry, self._key.precision
        _, outputs, inner = filters.shape
        if self._key.output_last:
            first = first_row(rows, g.pixels)
            target = output.transpose(0, 2, 3, 1).reshape(-1, g.G, outputs)[first : first + rows.rows]
            matmul(
                columns.transpose(1, 0, 2), filters.transpose(0, 2, 1), target.transpose(1, 0, 2), accumulate, precision
            )
            return
        pixels = min(rows.rows, g.pixels)
        images = rows.rows // pixels
        target = output.reshape(g.N, g.G, outputs, g.pixels)[rows.first_image : rows.first_image + images]
        target = target[..., rows.first_pixel : rows.first_pixel + pixels]
        sampled = columns.reshape(images, pixels, g.G, inner).transpose(0, 2, 3, 1)
        if g.G == 1:
            shared = self._engine.xp.broadcast_to(filters, (images, outputs, inner))
            matmul(shared, sampled[:, 0], target[:, 0], accumulate, precision)
            return
        for image in range(images):
            matmul(filters, sampled[image], target[image], accumulate, precision)


def _chunks(geometry: DeformConvGeometry, max_rows: int, channels_last: bool) -> Iterator[RowRange]:
    """Cut all rows into ranges that need few products: whole images, or a part of one image."""
    g = geometry
    P = g.pixels
    if channels_last:
        yield from row_ranges(g.N, P, max_rows)
    elif max_rows >= P:
        images = max_rows // P
        for image in range(0, g.N, images):
            yield RowRange(image, 0, min(images, g.N - image) * P)
    else:
        for image in range(g.N):
            for pixel in range(0, P, max_rows):
                yield RowRange(image, pixel, min(max_rows, P - pixel))
