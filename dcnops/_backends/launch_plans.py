"""Which kernels run, in which order, with which grid and scratch memory, against an `Engine`.

The plans know no array library: CuPy executes them on a GPU, the tests execute them on a CPU. Inside, everything is
channels-last: an image is `rows` [N*H*W, C], an output `rows` [N*oh*ow, O]. A deformable convolution works through
the output in chunks of rows whose columns [rows, G, K, C/G] stay in the L2 cache of a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from math import gcd
from typing import Any

from dcnops._geometry import DeformConvGeometry, DeformConvSizes
from dcnops._kernels import DTYPE_SUFFIX, Engine

__all__ = ["CHUNK_BYTES", "SAMPLE_BYTES", "deform_conv2d", "deform_conv2d_backward"]

CHUNK_BYTES = 16 * 2**20
"""Scratch memory for columns, in bytes: what stays in the L2 cache of a large GPU."""

SAMPLE_BYTES = 72
"""Shared memory per sampling point, in bytes; the kernels assert that it is enough."""

_SCALAR = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_VECTOR_BYTES = 16
_THREADS = 256
_WARP = 32
_TRANSPOSE_TILE = 32
_MAX_BLOCKS = 2**20
_MAX_ROWS = 2**30

_pointer = ctypes.c_void_p
_int = ctypes.c_int


class RowRange(ctypes.Structure):
    _fields_ = [("first_image", _int), ("first_pixel", _int), ("rows", _int)]


class LayoutParams(ctypes.Structure):
    _fields_ = [
        ("source", _pointer),
        ("bias", _pointer),
        ("target", _pointer),
        ("N", _int),
        ("C", _int),
        ("P", _int),
        ("range", RowRange),
    ]


class DeformConvForwardParams(ctypes.Structure):
    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("columns", _pointer),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("tile_rows", _int),
    ]


class DeformConvBackwardParams(ctypes.Structure):
    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("grad_columns", _pointer),
        ("columns", _pointer),
        ("grad_offset", _pointer),
        ("grad_mask", _pointer),
        ("grad_input", _pointer),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("tile_rows", _int),
    ]


def deform_conv2d(
    engine: Engine,
    geometry: DeformConvGeometry,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any | None,
    mask: Any | None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Any:
    """The output [N, O, oh, ow] of contiguous arrays in NCHW order."""
    g = geometry
    dtype = str(input.dtype.name)
    output = engine.empty(g.output_shape, input.dtype)
    input_rows = _all_rows(engine, input, g.N, g.C, g.H * g.W)
    filters = _filter_rows(engine, g, weight)
    samples = _SampleLaunch(engine, g, dtype, offset)

    chunk = _chunk_rows(g, chunk_bytes // _ITEMSIZE[dtype])
    columns = engine.empty((min(chunk, g.N * g.pixels), g.G, g.K * g.C // g.G), input.dtype)
    output_rows = engine.empty((columns.shape[0], g.O), _sum_dtype(engine, input.dtype))
    for rows in _row_ranges(g.N, g.pixels, chunk):
        samples.launch(
            "deform_conv2d_forward",
            "deform_conv2d_columns",
            DeformConvForwardParams(
                engine.pointer(input_rows),
                engine.pointer(offset),
                engine.pointer(mask),
                engine.pointer(columns),
                g.params(),
                rows,
                samples.tile_rows,
            ),
            rows.rows,
        )
        _multiply_columns(engine, columns[: rows.rows], filters, output_rows[: rows.rows])
        _transpose(engine, "rows_to_pixels", output_rows, output, g.N, g.O, g.pixels, rows, bias)
    return output


def deform_conv2d_backward(
    engine: Engine,
    geometry: DeformConvGeometry,
    grad_out: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any | None,
    needs: frozenset[str],
    chunk_bytes: int = CHUNK_BYTES,
) -> dict[str, Any]:
    """The gradients named in `needs`, each like its argument, of contiguous arrays in NCHW order."""
    g = geometry
    dtype = str(input.dtype.name)
    sum_dtype = _sum_dtype(engine, input.dtype)
    gradients = {}
    if "bias" in needs:
        gradients["bias"] = _channel_sums(engine, grad_out, g.N, g.O, g.pixels)
    if "offset" in needs:
        gradients["offset"] = engine.empty(offset.shape, offset.dtype)
    if "mask" in needs:
        assert mask is not None
        gradients["mask"] = engine.empty(mask.shape, mask.dtype)
    sampled = bool(needs & {"offset", "mask"})
    if not needs & {"input", "weight"} and not sampled:
        return gradients

    input_rows = _all_rows(engine, input, g.N, g.C, g.H * g.W)
    filters = _filter_rows(engine, g, weight)
    samples = _SampleLaunch(engine, g, dtype, offset)
    grad_input = engine.zeros((g.N * g.H * g.W, g.C), sum_dtype) if "input" in needs else None
    grad_filters = engine.zeros((g.G, g.O // g.G, g.K * g.C // g.G), sum_dtype) if "weight" in needs else None

    needs_grad_columns = sampled or "input" in needs
    buffers = needs_grad_columns + ("weight" in needs)
    chunk = _chunk_rows(g, chunk_bytes // (buffers * _ITEMSIZE[dtype]))
    shape = (min(chunk, g.N * g.pixels), g.G, g.K * g.C // g.G)
    grad_out_rows = engine.empty((shape[0], g.O), input.dtype)
    grad_columns = engine.empty(shape, input.dtype) if needs_grad_columns else None
    columns = engine.empty(shape, input.dtype) if "weight" in needs else None
    for rows in _row_ranges(g.N, g.pixels, chunk):
        _transpose(engine, "pixels_to_rows", grad_out, grad_out_rows, g.N, g.O, g.pixels, rows)
        by_group = grad_out_rows[: rows.rows].reshape(rows.rows, g.G, g.O // g.G).transpose(1, 0, 2)
        if grad_columns is not None:
            engine.matmul(by_group, filters, grad_columns[: rows.rows].transpose(1, 0, 2))
        params = DeformConvBackwardParams(
            engine.pointer(input_rows),
            engine.pointer(offset),
            engine.pointer(mask),
            engine.pointer(grad_columns),
            engine.pointer(columns),
            engine.pointer(gradients.get("offset")),
            engine.pointer(gradients.get("mask")),
            engine.pointer(grad_input),
            g.params(),
            rows,
            samples.tile_rows,
        )
        if sampled:
            samples.launch("deform_conv2d_backward", "deform_conv2d_grad_samples", params, rows.rows)
        elif columns is not None:
            samples.launch(
                "deform_conv2d_forward",
                "deform_conv2d_columns",
                DeformConvForwardParams(
                    params.input, params.offset, params.mask, params.columns, params.size, rows, samples.tile_rows
                ),
                rows.rows,
            )
        if grad_input is not None:
            samples.launch("deform_conv2d_backward", "deform_conv2d_grad_input", params, rows.rows)
        if grad_filters is not None:
            assert columns is not None
            engine.matmul(
                by_group.transpose(0, 2, 1), columns[: rows.rows].transpose(1, 0, 2), grad_filters, accumulate=True
            )
    if grad_input is not None:
        gradients["input"] = _all_pixels(engine, grad_input, input, g.N, g.C, g.H * g.W)
    if grad_filters is not None:
        gradients["weight"] = _all_pixels(engine, grad_filters, weight, g.O, g.C // g.G, g.K)
    return gradients


class _SampleLaunch:
    """How the kernels that work on sampling points are launched for one call.

    The x dimension of a block runs over the channel vectors of a sampling point, y over sampling points.
    """

    def __init__(self, engine: Engine, geometry: DeformConvGeometry, dtype: str, offset: Any) -> None:
        g = geometry
        vector = gcd(g.C // g.D, g.C // g.G, _VECTOR_BYTES // _ITEMSIZE[dtype])
        vectors = g.C // g.D // vector
        lanes = min(_WARP, 1 << (vectors - 1).bit_length())
        self._engine = engine
        self._geometry = g
        self._block = (lanes, _THREADS // lanes)
        self._macros = {
            **_macros(dtype),
            "DCN_OFFSET_SCALAR": _SCALAR[str(offset.dtype.name)],
            "DCN_VEC": vector,
            "DCN_SAMPLE_BYTES": SAMPLE_BYTES,
        }
        self.tile_rows = max(_WARP, self._block[1])

    def launch(self, unit: str, kernel: str, params: ctypes.Structure, rows: int) -> None:
        g = self._geometry
        tiles = _ceil_div(rows, self.tile_rows) * g.D * g.K
        self._engine.launch(
            unit,
            kernel,
            self._macros,
            min(tiles, _MAX_BLOCKS),
            self._block,
            params,
            self.tile_rows * SAMPLE_BYTES,
        )


def _macros(dtype: str) -> dict[str, str | int]:
    return {"DCN_SUFFIX": DTYPE_SUFFIX[dtype], "DCN_SCALAR": _SCALAR[dtype]}


def _sum_dtype(engine: Engine, dtype: Any) -> Any:
    return engine.xp.dtype("float64" if dtype.name == "float64" else "float32")


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _chunk_rows(geometry: DeformConvGeometry, elements: int) -> int:
    """Rows whose columns have at most `elements` elements, at least one."""
    return max(1, elements // (geometry.K * geometry.C))


def _row_ranges(images: int, pixels: int, chunk: int) -> Iterator[RowRange]:
    """The rows of all images in stretches of at most `chunk`."""
    for first in range(0, images * pixels, chunk):
        yield RowRange(first // pixels, first % pixels, min(chunk, images * pixels - first))


def _multiply_columns(engine: Engine, columns: Any, filters: Any, output_rows: Any) -> None:
    """output_rows [rows, O] = columns [rows, G, K*C/G] times filters [G, O/G, K*C/G], group by group."""
    rows, G, _ = columns.shape
    by_group = output_rows.reshape(rows, G, filters.shape[1]).transpose(1, 0, 2)
    engine.matmul(columns.transpose(1, 0, 2), filters.transpose(0, 2, 1), by_group)


def _filter_rows(engine: Engine, geometry: DeformConvGeometry, weight: Any) -> Any:
    """Weights [G, O/G, K*C/G], channels innermost as in the columns."""
    g = geometry
    return _all_rows(engine, weight, g.O, g.C // g.G, g.K).reshape(g.G, g.O // g.G, g.K * g.C // g.G)


def _all_rows(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """New rows [N*P, C] of images [N, C, P]."""
    rows_array = engine.empty((N * P, C), images.dtype)
    for rows in _row_ranges(N, P, _MAX_ROWS):
        first = rows.first_image * P + rows.first_pixel
        _transpose(engine, "pixels_to_rows", images, rows_array[first:], N, C, P, rows)
    return rows_array


def _all_pixels(engine: Engine, sums: Any, like: Any, N: int, C: int, P: int) -> Any:
    """New images [N, C, P], of the shape and dtype of `like`, of sums [N*P, C]."""
    images = engine.empty(like.shape, like.dtype)
    for rows in _row_ranges(N, P, _MAX_ROWS):
        first = rows.first_image * P + rows.first_pixel
        _transpose(engine, "rows_to_pixels", sums.reshape(N * P, C)[first:], images, N, C, P, rows)
    return images


def _transpose(
    engine: Engine,
    kernel: str,
    source: Any,
    target: Any,
    N: int,
    C: int,
    P: int,
    rows: RowRange,
    bias: Any | None = None,
) -> None:
    """Move `rows` between images [N, C, P] and an array that begins with them."""
    images = target if kernel == "rows_to_pixels" else source
    tiles = _ceil_div(rows.rows, _TRANSPOSE_TILE) * _ceil_div(C, _TRANSPOSE_TILE)
    engine.launch(
        "layout",
        kernel,
        _macros(str(images.dtype.name)),
        min(tiles, _MAX_BLOCKS),
        (_TRANSPOSE_TILE, _THREADS // _TRANSPOSE_TILE),
        LayoutParams(engine.pointer(source), engine.pointer(bias), engine.pointer(target), N, C, P, rows),
        _TRANSPOSE_TILE * (_TRANSPOSE_TILE + 1) * 8,
    )


def _channel_sums(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """Sums [C] of images [N, C, P]."""
    result = engine.empty((C,), images.dtype)
    params = LayoutParams(engine.pointer(images), None, engine.pointer(result), N, C, P, RowRange(0, 0, 0))
    macros = _macros(str(images.dtype.name))
    engine.launch("layout", "channel_sums", macros, min(C, _MAX_BLOCKS), (_THREADS, 1), params, _THREADS * 8)
    return result
