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
    "empty_images",
    "is_channels_last",
    "put_rows",
    "row_ranges",
    "sum_dtype",
    "take_rows",
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
_MAX_ONES = 2**20


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


def is_channels_last(images: Any) -> bool:
    """Whether images [N, C, H, W] lie in memory as [N, H, W, C] (and not, as they are, in both orders at once)."""
    return not images.flags.c_contiguous and bool(images.transpose(0, 2, 3, 1).flags.c_contiguous)


def empty_images(engine: Engine, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """New images [N, C, H, W] in the memory order of `like`."""
    N, C, H, W = shape
    if is_channels_last(like):
        return engine.empty((N, H, W, C), dtype).transpose(0, 3, 1, 2)
    return engine.empty((N, C, H, W), dtype)


def all_rows(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """Rows [N*P, C] of images [N, C, P]: the images themselves where they are channels-last, else a new array."""
    if is_channels_last(images) and (engine.pointer(images) or 0) % VECTOR_BYTES == 0:
        return _flat(images, C)
    rows_array = engine.empty((N * P, C), images.dtype)
    for rows in row_ranges(N, P, _MAX_ROWS):
        take_rows(engine, images, C, P, rows, rows_array[_first(rows, P) :], copy=True)
    return rows_array


def all_pixels(engine: Engine, sums: Any, like: Any, N: int, C: int, P: int) -> Any:
    """New images of the shape, dtype and memory order of `like`, of sums [N*P, C]."""
    images = empty_images(engine, like.shape, like.dtype, like)
    for rows in row_ranges(N, P, _MAX_ROWS):
        put_rows(engine, sums.reshape(N * P, C)[_first(rows, P) :], images, C, P, rows)
    return images


def take_rows(engine: Engine, images: Any, C: int, P: int, rows: RowRange, scratch: Any, copy: bool = False) -> Any:
    """`rows` of images [N, C, P]: a view where they are channels-last and no `copy` is asked for, else `scratch`."""
    if not is_channels_last(images):
        _transpose(engine, "pixels_to_rows", images, scratch, images, C, P, rows)
        return scratch[: rows.rows]
    first = _first(rows, P)
    view = _flat(images, C)[first : first + rows.rows]
    if not copy:
        return view
    _transpose(engine, "pixels_to_rows", view, scratch, images, C, 1, RowRange(0, 0, rows.rows))
    return scratch[: rows.rows]


def put_rows(engine: Engine, sums: Any, images: Any, C: int, P: int, rows: RowRange, bias: Any | None = None) -> None:
    """Round sums, an array that begins with `rows`, into images [N, C, P], plus `bias` [C]."""
    if is_channels_last(images):
        # Channels-last images are images of one pixel, one for each row.
        target = _flat(images, C)[_first(rows, P) :]
        _transpose(engine, "rows_to_pixels", sums, target, images, C, 1, RowRange(0, 0, rows.rows), bias)
    else:
        _transpose(engine, "rows_to_pixels", sums, images, images, C, P, rows, bias)


def _flat(images: Any, C: int) -> Any:
    return images.transpose(0, 2, 3, 1).reshape(-1, C)


def _first(rows: RowRange, P: int) -> int:
    return int(rows.first_image * P + rows.first_pixel)


def _transpose(
    engine: Engine,
    kernel: str,
    source: Any,
    target: Any,
    images: Any,
    C: int,
    P: int,
    rows: RowRange,
    bias: Any | None = None,
) -> None:
    tiles = ceil_div(rows.rows, _TRANSPOSE_TILE) * ceil_div(C, _TRANSPOSE_TILE)
    engine.launch(
        "layout",
        kernel,
        data_macros(str(images.dtype.name)),
        min(tiles, MAX_BLOCKS),
        (_TRANSPOSE_TILE, THREADS // _TRANSPOSE_TILE),
        LayoutParams(engine.pointer(source), engine.pointer(bias), engine.pointer(target), 0, C, P, rows),
        _TRANSPOSE_TILE * (_TRANSPOSE_TILE + 1) * 8,
    )


def channel_sums(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """Sums [C] of images [N, C, P]."""
    result = engine.empty((C,), images.dtype)
    if not is_channels_last(images):
        params = LayoutParams(engine.pointer(images), None, engine.pointer(result), N, C, P, RowRange(0, 0, 0))
        macros = data_macros(str(images.dtype.name))
        engine.launch("layout", "channel_sums", macros, min(C, MAX_BLOCKS), (THREADS, 1), params, THREADS * 8)
        return result
    sums = engine.zeros((1, 1, C), sum_dtype(engine, images.dtype))
    rows_array = _flat(images, C)
    for first in range(0, N * P, _MAX_ONES):
        part = rows_array[first : first + _MAX_ONES]
        engine.matmul(_ones(engine, len(part), images.dtype), part[None], sums, accumulate=True)
    _transpose(engine, "rows_to_pixels", sums, result, images, C, 1, RowRange(0, 0, 1))
    return result


def _ones(engine: Engine, count: int, dtype: Any) -> Any:
    """Ones [1, 1, count]; those of 16 bits by their bits, which need no arithmetic in that type."""
    bits = {"float16": 0x3C00, "bfloat16": 0x3F80}.get(dtype.name)
    if bits is None:
        return engine.xp.ones((1, 1, count), dtype)
    return engine.xp.full((1, 1, count), bits, engine.xp.uint16).view(dtype)
