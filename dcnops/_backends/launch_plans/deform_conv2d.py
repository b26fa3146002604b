"""Deformable convolution: output rows [N*oh*ow, O] in chunks, each from its columns [rows, G, K, C/G]."""

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
    WARP,
    WORKSPACE_BYTES,
    LayoutJob,
    RowRange,
    all_pixels,
    all_rows,
    ceil_div,
    channel_lanes,
    channel_sums,
    data_macros,
    empty_images,
    is_channels_last,
    row_ranges,
    rows_job,
    sum_dtype,
    take_rows,
)
from dcnops._geometry import DeformConvGeometry, DeformConvSizes
from dcnops._kernels import Engine

__all__ = [
    "SAMPLE_BYTES",
    "DeformConvBackwardParams",
    "SampleLaunch",
    "deform_conv2d_backward",
    "filters_job",
]

SAMPLE_BYTES = 72
"""Shared memory per sampling point, in bytes; the kernels assert that it is enough."""

_pointer = ctypes.c_void_p
_int = ctypes.c_int


class DeformConvBackwardParams(ctypes.Structure):
    """What the kernels of deform_conv2d_backward.cu take."""

    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("grad_columns", _pointer),
        ("columns", _pointer),
        ("grad_offset", _pointer),
        ("grad_mask", _pointer),
        ("grad_input", _pointer),
        ("keys", _pointer),
        ("weights", _pointer),
        ("order", _pointer),
        ("starts", _pointer),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("lists", ctypes.c_longlong),
        ("tile_rows", _int),
    ]


def deform_conv2d_backward(
    engine: Engine,
    geometry: DeformConvGeometry,
    grad_out: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any | None,
    needs: frozenset[str],
    deterministic: bool = False,
    chunk_bytes: int = WORKSPACE_BYTES,
    precision: str = "ieee",
) -> dict[str, Any]:
    """The gradients named in `needs`, each like its argument, of contiguous arrays.

    `input` and `grad_out` may be channels-last; the input's gradient has the memory order of the input.
    `deterministic` takes the input's gradient without atomic additions, by sorting.
    """
    g = geometry
    dtype = str(input.dtype.name)
    sums = sum_dtype(engine, input.dtype)
    gradients = {}
    if "bias" in needs:
        gradients["bias"] = channel_sums(engine, grad_out, g.N, g.O, g.pixels)
    if "offset" in needs:
        gradients["offset"] = empty_images(engine, offset.shape, offset.dtype, offset)
    if "mask" in needs:
        assert mask is not None
        gradients["mask"] = empty_images(engine, mask.shape, mask.dtype, mask)
    sampled = bool(needs & {"offset", "mask"})
    if not needs & {"input", "weight"} and not sampled:
        return gradients

    input_rows = all_rows(engine, input, g.N, g.C, g.H * g.W)
    filters = _filter_rows(engine, g, weight)
    samples = SampleLaunch(engine, g, dtype, offset)
    grad_input = engine.zeros((g.N * g.H * g.W, g.C), sums) if "input" in needs else None
    grad_filters = engine.zeros((g.G, g.O // g.G, g.K * g.C // g.G), sums) if "weight" in needs else None

    needs_grad_columns = sampled or "input" in needs
    buffers = needs_grad_columns + ("weight" in needs)
    chunk = _chunk_rows(g, chunk_bytes // (buffers * ITEMSIZE[dtype]))
    shape = (min(chunk, g.N * g.pixels), g.G, g.K * g.C // g.G)
    grad_out_rows = engine.empty((shape[0], g.O), input.dtype)
    grad_columns = engine.empty(shape, input.dtype) if needs_grad_columns else None
    columns = engine.empty(shape, input.dtype) if "weight" in needs else None
    for rows in row_ranges(g.N, g.pixels, chunk):
        by_group = (
            take_rows(engine, grad_out, g.O, g.pixels, rows, grad_out_rows)
            .reshape(rows.rows, g.G, g.O // g.G)
            .transpose(1, 0, 2)
        )
        if grad_columns is not None:
            engine.matmul(by_group, filters, grad_columns[: rows.rows].transpose(1, 0, 2), False, precision)
        params = DeformConvBackwardParams(
            input=engine.pointer(input_rows),
            offset=engine.pointer(offset),
            mask=engine.pointer(mask),
            grad_columns=engine.pointer(grad_columns),
            columns=engine.pointer(columns),
            grad_offset=engine.pointer(gradients.get("offset")),
            grad_mask=engine.pointer(gradients.get("mask")),
            grad_input=engine.pointer(grad_input),
            size=g.params(is_channels_last(offset), mask is not None and is_channels_last(mask)),
            range=rows,
            tile_rows=samples.tile_rows,
        )
        from dcnops._backends.launch_plans import deform_conv2d_forward

        if sampled:
            samples.launch("deform_conv2d_backward", "deform_conv2d_grad_samples", params, rows.rows)
        elif columns is not None:
            samples.launch(
                "deform_conv2d_forward",
                "deform_conv2d_columns",
                deform_conv2d_forward.DeformConvForwardParams(
                    params.input, params.offset, params.mask, params.columns, params.size, rows, samples.tile_rows
                ),
                rows.rows,
            )
        if grad_input is not None and deterministic:
            samples.launch_collection(params)
        elif grad_input is not None:
            samples.launch("deform_conv2d_backward", "deform_conv2d_grad_input", params, rows.rows)
        if grad_filters is not None:
            assert columns is not None
            engine.matmul(
                by_group.transpose(0, 2, 1), columns[: rows.rows].transpose(1, 0, 2), grad_filters, True, precision
            )
    if grad_input is not None:
        gradients["input"] = all_pixels(engine, grad_input, input, g.N, g.C, g.H * g.W)
    if grad_filters is not None:
        gradients["weight"] = all_pixels(engine, grad_filters, weight, g.O, g.C // g.G, g.K)
    return gradients


class SampleLaunch:
    """How the kernels that work on sampling points are launched for one call.

    The x dimension of a block runs over the channel vectors of a sampling point, y over sampling points.
    """

    def __init__(self, engine: Engine, geometry: DeformConvGeometry, dtype: str, offset: Any) -> None:
        g = geometry
        vector = gcd(g.C // g.D, g.C // g.G, VECTOR_BYTES // ITEMSIZE[dtype])
        vectors = g.C // g.D // vector
        lanes = channel_lanes(vectors)
        self._engine = engine
        self._geometry = g
        self._sums = engine.xp.dtype("float64" if dtype == "float64" else "float32")
        self._block = (lanes, THREADS // lanes)
        self._macros = {
            **data_macros(dtype),
            "DCN_OFFSET_SCALAR": SCALAR[str(offset.dtype.name)],
            "DCN_VEC": vector,
            "DCN_SAMPLE_BYTES": SAMPLE_BYTES,
        }
        self.tile_rows = max(WARP, self._block[1])

    def launch(self, unit: str, kernel: str, params: ctypes.Structure, rows: int) -> None:
        g = self._geometry
        tiles = ceil_div(rows, self.tile_rows) * g.D * g.K
        self._engine.launch(
            unit,
            kernel,
            self._macros,
            min(tiles, MAX_BLOCKS),
            self._block,
            params,
            self.tile_rows * SAMPLE_BYTES,
        )

    def launch_collection(self, params: DeformConvBackwardParams) -> None:
        """Add a chunk's share of the input's gradient in an order that is always the same."""
        g, engine, rows = self._geometry, self._engine, params.range
        samples = rows.rows * g.D * g.K
        images = (rows.first_pixel + rows.rows - 1) // g.pixels + 1
        params.lists = images * g.H * g.W * g.D
        keys = engine.empty((4 * samples,), engine.xp.int64)
        weights = engine.empty((4 * samples,), self._sums)
        params.keys, params.weights = engine.pointer(keys), engine.pointer(weights)
        unit, block = "deform_conv2d_backward", self._block
        grid = min(ceil_div(samples, THREADS), MAX_BLOCKS)
        engine.launch(unit, "deform_conv2d_list_neighbours", self._macros, grid, (THREADS, 1), params)

        order = engine.xp.argsort(keys, kind="stable")
        starts = engine.xp.searchsorted(keys[order], engine.xp.arange(params.lists + 1))
        params.order, params.starts = engine.pointer(order), engine.pointer(starts)
        grid = min(ceil_div(params.lists, block[1]), MAX_BLOCKS)
        engine.launch(unit, "deform_conv2d_collect_input", self._macros, grid, block, params)


def _chunk_rows(geometry: DeformConvGeometry, elements: int) -> int:
    """Rows whose columns have at most `elements` elements, at least one."""
    return max(1, elements // (geometry.K * geometry.C))


def filters_job(engine: Engine, geometry: DeformConvGeometry, weight: Any, filters: Any) -> LayoutJob:
    """Write weights [O, C/G, kh, kw] to `filters` [O, K, C/G], channels innermost as in the columns."""
    g = geometry
    return rows_job(engine, weight, g.C // g.G, g.K, RowRange(0, 0, g.O * g.K), filters)


def _filter_rows(engine: Engine, geometry: DeformConvGeometry, weight: Any) -> Any:
    """Weights [G, O/G, K*C/G], channels innermost as in the columns."""
    g = geometry
    return all_rows(engine, weight, g.O, g.C // g.G, g.K).reshape(g.G, g.O // g.G, g.K * g.C // g.G)
