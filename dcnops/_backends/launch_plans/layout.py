"""What all plans share: element types, and moving between images [N, C, P] and rows [N*P, C].

P are the pixels of an image; rows are the pixels of all images in one sequence, channels together.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

from dcnops._kernels import DTYPE_SUFFIX, Engine

__all__ = [
    "CHUNK_BYTES",
    "ITEMSIZE",
    "MAX_BLOCKS",
    "SCALAR",
    "THREADS",
    "VECTOR_BYTES",
    "WARP",
    "LayoutParams",
    "RowRange",
    "all_pixels",
    "all_rows",
    "ceil_div",
    "channel_lanes",
    "channel_sums",
    "data_macros",
    "row_ranges",
    "sum_dtype",
    "transpose",
]

CHUNK_BYTES = 16 * 2**20
"""Scratch memory of a chunk, in bytes: what stays in the L2 cache of a large GPU."""

SCALAR = {"float16": "Half", "bfloat16": "BFloat16", "float32": "float", "float64": "double"}
"""Element types by their name in the kernels."""

ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

VECTOR_BYTES = 16
THREADS = 256
WARP = 32
MAX_BLOCKS = 2**20

_TRANSPOSE_TILE = 32
_MAX_ROWS = 2**30


class RowRange(ctypes.Structure):
    """A stretch of rows (`RowRange` in dcn/rows.cuh)."""

    _fields_ = [("first_image", ctypes.c_int), ("first_pixel", ctypes.c_int), ("rows", ctypes.c_int)]


class LayoutParams(ctypes.Structure):
    """What the kernels of layout.cu take."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("N", ctypes.c_int),
        ("C", ctypes.c_int),
        ("P", ctypes.c_int),
        ("range", RowRange),
    ]


def data_macros(dtype: str) -> dict[str, str | int]:
    """The macros that name the element type of the data."""
    return {"DCN_SUFFIX": DTYPE_SUFFIX[dtype], "DCN_SCALAR": SCALAR[dtype]}


def sum_dtype(engine: Engine, dtype: Any) -> Any:
    """The dtype of coordinates and sums beside data of `dtype`."""
    return engine.xp.dtype("float64" if dtype.name == "float64" else "float32")


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def channel_lanes(vectors: int) -> int:
    """Threads of a warp, a power of two, for so many channel vectors."""
    return min(WARP, 1 << (vectors - 1).bit_length())


def row_ranges(images: int, pixels: int, chunk: int) -> Iterator[RowRange]:
    """The rows of all images in stretches of at most `chunk`."""
    for first in range(0, images * pixels, chunk):
        yield RowRange(first // pixels, first % pixels, min(chunk, images * pixels - first))


def all_rows(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """New rows [N*P, C] of images [N, C, P]."""
    rows_array = engine.empty((N * P, C), images.dtype)
    for rows in row_ranges(N, P, _MAX_ROWS):
        first = rows.first_image * P + rows.first_pixel
        transpose(engine, "pixels_to_rows", images, rows_array[first:], N, C, P, rows)
    return rows_array


def all_pixels(engine: Engine, sums: Any, like: Any, N: int, C: int, P: int) -> Any:
    """New images [N, C, P], of the shape and dtype of `like`, of sums [N*P, C]."""
    images = engine.empty(like.shape, like.dtype)
    for rows in row_ranges(N, P, _MAX_ROWS):
        first = rows.first_image * P + rows.first_pixel
        transpose(engine, "rows_to_pixels", sums.reshape(N * P, C)[first:], images, N, C, P, rows)
    return images


def transpose(
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
    tiles = ceil_div(rows.rows, _TRANSPOSE_TILE) * ceil_div(C, _TRANSPOSE_TILE)
    engine.launch(
        "layout",
        kernel,
        data_macros(str(images.dtype.name)),
        min(tiles, MAX_BLOCKS),
        (_TRANSPOSE_TILE, THREADS // _TRANSPOSE_TILE),
        LayoutParams(engine.pointer(source), engine.pointer(bias), engine.pointer(target), N, C, P, rows),
        _TRANSPOSE_TILE * (_TRANSPOSE_TILE + 1) * 8,
    )


def channel_sums(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """Sums [C] of images [N, C, P]."""
    result = engine.empty((C,), images.dtype)
    params = LayoutParams(engine.pointer(images), None, engine.pointer(result), N, C, P, RowRange(0, 0, 0))
    macros = data_macros(str(images.dtype.name))
    engine.launch("layout", "channel_sums", macros, min(C, MAX_BLOCKS), (THREADS, 1), params, THREADS * 8)
    return result
