"""Arrays as the compiled loops take them, and back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from dcnops._backends.cpu.transpose_loops import STRIP

Array = npt.NDArray[Any]

_CACHE_LINE = 64


def sum_dtype(array: Array) -> np.dtype[Any]:
    """The dtype of coordinates and sums beside data like `array`."""
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def contiguous(array: Array) -> Array:
    """The array, or a C-contiguous copy."""
    return np.ascontiguousarray(array)


def plain(array: Array, dtype: np.dtype[Any], *shape: int) -> Array:
    """The array as the compiled loops take it; a copy only where it is something else."""
    return np.require(array, dtype, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"]).reshape(shape)


def rounded(array: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype, copy=False)


class Staged:
    """Part of a result in the dtype of computation: `array` is the part itself, or is rounded into it by `store`."""

    def __init__(self, part: Array, dtype: np.dtype[Any]) -> None:
        self._part = part
        count, channels, *extents = part.shape
        self.array = part.astype(dtype, copy=False).reshape(count, channels, math.prod(extents))

    def store(self) -> None:
        if self.array.dtype != self._part.dtype:
            self._part[...] = rounded(self.array, self._part.dtype).reshape(self._part.shape)


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Scratch that starts at a cache line: no vector straddles two, and threads that own channels share none."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _CACHE_LINE, np.uint8)
    start = -buffer.ctypes.data % _CACHE_LINE
    return buffer[start : start + size].view(dtype).reshape(shape)


def strips(count: int, values: int) -> int:
    """Items of `transpose_loops` for so many images of so many pixels."""
    return count * -(-values // STRIP)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
