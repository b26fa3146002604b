"""Conversion of arrays for the compiled loops, and scratch memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnops._backends.cpu.compiled import CACHE_LINE
from dcnops._backends.cpu.transpose_loops import STRIP
from dcnops._dtypes import DTYPES

Array = npt.NDArray[Any]

CHANNELS_PER_THREAD = 16
"""Minimum number of channels for a thread that owns channels: a cache line of float32."""


def compute_dtype(array: Array) -> np.dtype[Any]:
    """Return the dtype of coordinates and sums for data of the dtype of `array`."""
    return np.dtype(DTYPES[array.dtype.name].sum_dtype)


def contiguous(array: Array) -> Array:
    """Return the array itself if it is C-contiguous, else a copy."""
    return np.ascontiguousarray(array)


def loop_array(array: Array, dtype: np.dtype[Any], *shape: int) -> Array:
    """Return the array in the form that the compiled loops need, copied only if necessary."""
    return np.require(array, dtype, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"]).reshape(shape)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return the array itself if it has the dtype, else a converted copy."""
    return array.astype(dtype, copy=False)


class StagedResult:
    """Slice of a result in the dtype of computation: a view, or a copy that `store` rounds into the result."""

    def __init__(self, result: Array, dtype: np.dtype[Any]) -> None:
        self._slice = result
        count, channels, *extents = result.shape
        self.array = result.astype(dtype, copy=False).reshape(count, channels, math.prod(extents))

    def store(self) -> None:
        """Round `array` into the result, unless it is a view of it."""
        if self.array.dtype != self._slice.dtype:
            self._slice[...] = rounded(self.array, self._slice.dtype).reshape(self._slice.shape)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return scratch memory that starts at a cache line.

    No vector then crosses a line, and threads that own different channels share none.
    """
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def strip_count(count: int, pixels: int) -> int:
    """Return the number of work items of `transpose_loops` for `count` images of `pixels` pixels."""
    return count * -(-pixels // STRIP)


def round_up(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple
