"""Launch plan of array jobs: transposes between images [N, C, P] and rows [N*P, C], channel sums, and fills.

P is the number of pixels of an image. Rows are the pixels of all images, numbered consecutively, with contiguous
channels. Images may be channels-last, that is, rows already.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any

from dcnops._backends.cuda.engine import Engine, dtype_name
from dcnops._backends.cuda.kernel_constants import (
    ARRAY_JOBS_SHARED_BYTES,
    FILL_TILE_ELEMENTS,
    MAX_ARRAY_JOBS,
    MAX_BLOCKS,
    MAX_ROWS,
    SUM_TILE_CHANNELS,
    THREADS,
    TRANSPOSE_TILE_SIDE,
    VECTOR_BYTES,
    WARP,
    WIDE_TILE_ELEMENTS,
    ceil_div,
)
from dcnops._dtypes import DTYPES
from dcnops._shapes import ImageStrides

_PART_ROWS = 1024
"""Rows of channels-last images that a block sums."""


class RowRange(ctypes.Structure):
    """Consecutive rows (`RowRange` in dcn/rows.cuh)."""

    _fields_ = [("first_image", ctypes.c_int), ("first_pixel", ctypes.c_int), ("rows", ctypes.c_int)]


class ArrayTask(IntEnum):
    """Kind of a job (`ArrayTask` in dcn/array_job.cuh)."""

    NOTHING = 0
    PIXELS_TO_ROWS = 1
    PIXELS_TO_ROUNDED_ROWS = 2
    WIDE_PIXELS_TO_ROWS = 3
    ROWS_TO_PIXELS = 4
    ROWS_TO_WIDE_PIXELS = 5
    SUM_PIXELS = 6
    SUM_ROWS = 7
    SUM_ROW_PARTS = 8
    FILL_PIXELS = 9
    ZERO = 10


class ArrayJob(ctypes.Structure):
    """One job of a launch (`ArrayJob` in dcn/array_job.cuh)."""

    _fields_ = [
        ("source", ctypes.c_void_p),
        ("target", ctypes.c_void_p),
        ("task", ctypes.c_int),
        ("N", ctypes.c_int),
        ("C", ctypes.c_int),
        ("P", ctypes.c_int),
        ("range", RowRange),
        ("tiles", ctypes.c_int),
    ]


class ArrayJobsParams(ctypes.Structure):
    """Parameters of the kernel of array_jobs.cu."""

    _fields_ = [("jobs", ArrayJob * MAX_ARRAY_JOBS)]


def data_macros(dtype: str) -> dict[str, str | int]:
    """Return the macros that name the element type of the data."""
    return {"DCN_SUFFIX": DTYPES[dtype].suffix, "DCN_SCALAR": DTYPES[dtype].c_name}


def sum_dtype(engine: Engine, dtype: Any) -> Any:
    """Return the dtype of coordinates and sums for data of `dtype`."""
    return engine.xp.dtype(DTYPES[dtype_name(dtype)].sum_dtype)


def channel_lanes(vectors: int) -> int:
    """Return the number of threads of a warp, a power of two, that `vectors` channel vectors can occupy."""
    return min(WARP, 1 << (vectors - 1).bit_length())


def row_ranges(images: int, pixels: int, chunk: int) -> Iterator[RowRange]:
    """Yield the rows of all images in ranges of at most `chunk` rows."""
    for first in range(0, images * pixels, chunk):
        yield RowRange(first // pixels, first % pixels, min(chunk, images * pixels - first))


def is_channels_last(images: Any) -> bool:
    """Return True if images [N, C, H, W] are stored as [N, H, W, C] and are not C-contiguous as well."""
    return not images.flags.c_contiguous and bool(images.transpose(0, 2, 3, 1).flags.c_contiguous)


def is_evenly_spaced(images: Any) -> bool:
    """Return True if the pixels of images [N, C, H, W] are evenly spaced, as in a part of the channels of an array."""
    _, _, H, W = images.shape
    _, channel, row, pixel = images.strides
    fits = min(images.strides) >= 0 and max(channel, row, pixel) < 2**31
    return bool(fits and (row == W * pixel or H == 1 or W == 1))


def image_strides(images: Any | None) -> ImageStrides:
    """Return the strides of evenly spaced images [N, C, H, W]; zeros for None."""
    if images is None:
        return (0, 0, 0)
    image, channel, row, pixel = (stride // images.itemsize for stride in images.strides)
    return (image, channel, row if images.shape[3] == 1 else pixel)


def empty_images(engine: Engine, shape: tuple[int, ...], dtype: Any, like: Any) -> Any:
    """Return new contiguous or channels-last images [N, C, H, W], in the memory order of `like`."""
    N, C, H, W = shape
    if is_channels_last(like) or (not like.flags.c_contiguous and like.strides[1] < like.strides[3]):
        return engine.empty((N, H, W, C), dtype).transpose(0, 3, 1, 2)
    return engine.empty((N, C, H, W), dtype)


def run_array_jobs(engine: Engine, dtype: str, jobs: Sequence[ArrayJob]) -> None:
    """Run up to `MAX_ARRAY_JOBS` jobs on arrays of `dtype` in one launch. The caller keeps their arrays alive."""
    tiles = array_job_tiles(jobs)
    if tiles == 0:
        return
    launch = min(tiles, MAX_BLOCKS), (THREADS, 1), array_jobs_params(jobs), ARRAY_JOBS_SHARED_BYTES
    engine.launch("array_jobs", "run_array_jobs", data_macros(dtype), *launch)


def array_jobs_params(jobs: Sequence[ArrayJob]) -> ArrayJobsParams:
    assert len(jobs) <= MAX_ARRAY_JOBS
    return ArrayJobsParams((ArrayJob * MAX_ARRAY_JOBS)(*jobs))


def array_job_tiles(jobs: Sequence[ArrayJob]) -> int:
    return sum(job.tiles for job in jobs)


def are_rows(engine: Engine, images: Any) -> bool:
    """Return True if images [N, C, H, W] are rows: channels-last and aligned for vectors."""
    return is_channels_last(images) and (engine.pointer(images) or 0) % VECTOR_BYTES == 0


def pixels_to_rows_job(
    engine: Engine, images: Any, C: int, P: int, rows: RowRange, target: Any, round_to_tf32: bool = False
) -> ArrayJob:
    """Return the transpose job from `rows` of images [N, C, P] to `target`, which starts with the first of them.

    The images have the dtype of `target`, or float32 for a 16-bit `target`. `round_to_tf32` is for float32 only.
    """
    assert not round_to_tf32 or images.dtype == target.dtype == "float32"
    task = ArrayTask.PIXELS_TO_ROUNDED_ROWS if round_to_tf32 else ArrayTask.PIXELS_TO_ROWS
    if images.dtype != target.dtype:
        task = ArrayTask.WIDE_PIXELS_TO_ROWS
    if is_channels_last(images):
        # A row of channels-last images is an image of one pixel.
        images, P, rows = rows_view(images, C)[first_row(rows, P) :], 1, RowRange(0, 0, rows.rows)
    return _transpose_job(engine, task, images, target, C, P, rows, target.dtype.itemsize)


def rows_to_pixels_job(
    engine: Engine, sums: Any, images: Any, C: int, P: int, rows: RowRange, dtype: str | None = None
) -> ArrayJob:
    """Return the job that transposes `sums`, which start with `rows`, to images [N, C, P], rounded to their dtype.

    The images have the `dtype` of the other jobs of the launch, the default, or float32 where that is a 16-bit dtype.
    """
    is_wide = dtype not in (None, dtype_name(images.dtype))
    task = ArrayTask.ROWS_TO_WIDE_PIXELS if is_wide else ArrayTask.ROWS_TO_PIXELS
    if is_channels_last(images):
        images, P, rows = rows_view(images, C)[first_row(rows, P) :], 1, RowRange(0, 0, rows.rows)
    return _transpose_job(engine, task, sums, images, C, P, rows, images.dtype.itemsize)


def channel_sums_jobs(engine: Engine, images: Any, N: int, C: int, P: int, result: Any) -> tuple[Any, Any, Any]:
    """Return two jobs, for consecutive launches, that sum images [N, C, P] to [C], and their intermediate array."""
    sums = sum_dtype(engine, images.dtype)
    if is_channels_last(images):
        parts = ceil_div(N * P, _PART_ROWS)
        partial = engine.empty((parts, C), sums)
        first = ArrayJob(engine.pointer(images), engine.pointer(partial), ArrayTask.SUM_ROW_PARTS)
        first.C, first.P, first.range = C, _PART_ROWS, RowRange(0, 0, N * P)
        first.tiles = parts * ceil_div(C, SUM_TILE_CHANNELS)
    else:
        parts = N
        partial = engine.empty((parts, C), sums)
        first = ArrayJob(engine.pointer(images), engine.pointer(partial), ArrayTask.SUM_PIXELS, N, C, P)
        first.tiles = N * C
    second = ArrayJob(engine.pointer(partial), engine.pointer(result), ArrayTask.SUM_ROWS, 0, C, parts)
    second.tiles = ceil_div(C, SUM_TILE_CHANNELS)
    return first, second, partial


def fill_job(engine: Engine, bias: Any, images: Any, N: int, C: int, P: int) -> ArrayJob:
    """Return the job that fills images [N, C, P] with `bias` [C]."""
    sizes = (N * P, C, 1) if is_channels_last(images) else (N, C, P)
    job = ArrayJob(engine.pointer(bias), engine.pointer(images), ArrayTask.FILL_PIXELS, *sizes)
    job.tiles = ceil_div(N * C * P, FILL_TILE_ELEMENTS)
    return job


def zero_job(engine: Engine, sums: Any) -> ArrayJob:
    """Return the job that fills C-contiguous `sums` with zeros."""
    job = ArrayJob(None, engine.pointer(sums), ArrayTask.ZERO, len(sums), 1, sums.size // max(len(sums), 1))
    job.tiles = ceil_div(sums.size, FILL_TILE_ELEMENTS)
    return job


def as_rows(engine: Engine, images: Any, N: int, C: int, P: int) -> Any:
    """Return images [N, C, P] as rows [N*P, C]: a view if they are rows, otherwise a transpose."""
    if are_rows(engine, images):
        return rows_view(images, C)
    rows_array = engine.empty((N * P, C), images.dtype)
    for rows in row_ranges(N, P, MAX_ROWS):
        pixels_to_rows(engine, images, C, P, rows, rows_array[first_row(rows, P) :])
    return rows_array


def images_from_rows(engine: Engine, sums: Any, like: Any, N: int, C: int, P: int) -> Any:
    """Return sums [N*P, C] as new images with the shape, dtype and memory order of `like`."""
    images = empty_images(engine, like.shape, like.dtype, like)
    for rows in row_ranges(N, P, MAX_ROWS):
        job = rows_to_pixels_job(engine, sums.reshape(N * P, C)[first_row(rows, P) :], images, C, P, rows)
        run_array_jobs(engine, str(images.dtype.name), [job])
    return images


def pixels_to_rows(engine: Engine, images: Any, C: int, P: int, rows: RowRange, target: Any) -> None:
    """Run `pixels_to_rows_job`."""
    run_array_jobs(engine, str(images.dtype.name), [pixels_to_rows_job(engine, images, C, P, rows, target)])


def rows_view(images: Any, C: int) -> Any:
    """Return a view of channels-last images as rows."""
    return images.transpose(0, 2, 3, 1).reshape(-1, C)


def first_row(rows: RowRange, P: int) -> int:
    """Return the number of the first row of a range."""
    return int(rows.first_image * P + rows.first_pixel)


def _transpose_job(
    engine: Engine, task: ArrayTask, source: Any, target: Any, C: int, P: int, rows: RowRange, itemsize: int
) -> ArrayJob:
    """Return a transpose job; `itemsize` is that of the images, which decides the tiles."""
    job = ArrayJob(engine.pointer(source), engine.pointer(target), task, 0, C, P, rows)
    if task in (ArrayTask.WIDE_PIXELS_TO_ROWS, ArrayTask.ROWS_TO_WIDE_PIXELS):
        assert rows.first_image == rows.first_pixel == 0
        job.tiles = ceil_div(rows.rows * C, WIDE_TILE_ELEMENTS)
        return job
    side = TRANSPOSE_TILE_SIDE[itemsize]
    if P == 1:
        job.tiles = ceil_div(rows.rows * C, side * side)
    elif rows.first_pixel == 0 and rows.rows % P == 0 and side // 2 >= P:
        # Whole images of few pixels (`SmallImages` in dcn/transposes.cuh).
        vector = VECTOR_BYTES // itemsize
        job.tiles = rows.rows // P * ceil_div(C, side * side // P // vector * vector)
    elif rows.rows:
        # No tile spans two images.
        end = rows.first_pixel + rows.rows
        across = end // P * ceil_div(P, side) + ceil_div(end % P, side)
        job.tiles = (across - rows.first_pixel // side) * ceil_div(C, side)
    return job
