"""Weighted sums of samples, the computation of multi-scale deformable attention and deformable aggregation.

`value` is read where it lies, with channels last. Threads process ranges of queries; for the gradient of `value`, each
thread processes some heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from dcnops._backends.cpu import deform_attention_loops as loops
from dcnops._backends.cpu.arrays import CHANNELS_PER_THREAD, Array, aligned_empty, compute_dtype, loop_array
from dcnops._backends.cpu.threads import parallel, serial_if_small
from dcnops._explain import LOGGER
from dcnops._threads import threads_of_call

_PIXELS_PER_SCATTERED_QUERY = 8
"""From this number of pixels per query on, loading the pixels early gains time, as in the decoder of a detector."""


class Point(NamedTuple):
    """Point of a head: size and first pixel of its level; scale and base (vertical, horizontal) of its position."""

    height: int
    width: int
    start: int
    scale: tuple[float, float] = (1, 1)
    base: tuple[float, float] = (0, 0)


class HeadStrides(NamedTuple):
    """Elements from head to head of the offsets and the weights of a query, and the first element of the weights."""

    offset: int
    weight: int
    first_weight: int = 0


@dataclass(frozen=True)
class WeightedSamples:
    """Weighted sums of samples for `Lq` queries in each image.

    Attributes
    ----------
    queries : (int, int)
        Queries per image, and per row of an output image.
    origin, step : (float, float), (int, int)
        Position of the first query and distance between neighbours, vertical and horizontal.
    points : sequence of Point
        The points of a head.
    strides : HeadStrides
    value : array [N, S, heads, D]
    offset, weight : array [N*Lq, elements]
    """

    queries: tuple[int, int]
    origin: tuple[float, float]
    step: tuple[int, int]
    points: Sequence[Point]
    strides: HeadStrides
    value: Array
    offset: Array
    weight: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of computation."""
        return compute_dtype(self.value)

    def forward(self) -> Array:
        """Return the sums [N*Lq, heads, D] in the dtype of computation."""
        rows = len(self.offset)
        is_scattered = self.queries[0] < self.value.shape[1] // _PIXELS_PER_SCATTERED_QUERY
        out = np.empty((rows, *self.value.shape[2:]), self.dtype)
        LOGGER.debug("%d queries, %d threads", rows, threads_of_call())
        with serial_if_small(self._multiply_adds):
            parallel(
                loops.sum_samples, rows if out.size else 0,
                *self._shared, self._loop_value, *self._sampling, out, is_scattered,
                scratch=self._scratch,
            )  # fmt: skip
        return out

    def backward_sampling(self, grad_out: Array, grad_offset: Array, grad_weight: Array) -> None:
        """Write the gradients of offsets and weights to arrays of their shapes, or to none that are empty."""
        with serial_if_small(self._multiply_adds):
            parallel(
                loops.sampling_gradients, len(self.offset),
                *self._shared, self._loop_value, *self._sampling, grad_out, grad_offset, grad_weight,
                scratch=self._scratch,
            )  # fmt: skip

    def backward_value(self, grad_out: Array) -> Array:
        """Return the gradient of `value` in the dtype of computation."""
        gradient = np.zeros(self.value.shape, self.dtype)
        N, S, M, D = self.value.shape
        # A head is located by each thread that owns some of its channels, so it is split only if there are few.
        wanted = min(D // CHANNELS_PER_THREAD, -(-threads_of_call() // max(N * M, 1)))
        parts = next((parts for parts in range(wanted, 1, -1) if D % parts == 0), 1)
        by_part = M * parts, D // parts
        with serial_if_small(self._multiply_adds):
            parallel(
                loops.scatter_samples, N * M * parts if D and self.queries[0] else 0,
                *self._shared, *self._sampling,
                grad_out.reshape(len(grad_out), *by_part), gradient.reshape(N, S, *by_part), parts,
                scratch=self._scratch,
            )  # fmt: skip
        return gradient

    @cached_property
    def _shared(self) -> tuple[Any, ...]:
        """Sizes, origin and tables of all loops."""
        K = len(self.points)
        strips = -(-K // loops.STRIP)
        levels = np.zeros((3, strips * loops.STRIP), np.int32)
        scales = np.zeros((4, strips * loops.STRIP), self.dtype)
        levels[:, :K] = np.array([point[:3] for point in self.points]).T
        scales[:, :K] = np.array([point.scale + point.base for point in self.points]).T
        tables = [
            table.reshape(len(table), strips, loops.STRIP).transpose(1, 0, 2).reshape(strips, -1)
            for table in (levels, scales)
        ]
        origin = tuple(self.dtype.type(number) for number in self.origin)
        return (*self.queries, *self.step, self.value.shape[2], K, *self.strides), origin, *tables

    @cached_property
    def _loop_value(self) -> Array:
        return loop_array(self.value, self.dtype, *self.value.shape)

    @cached_property
    def _sampling(self) -> tuple[Array, Array]:
        offset, weight = (loop_array(array, self.dtype, *array.shape) for array in (self.offset, self.weight))
        return offset, weight

    @property
    def _multiply_adds(self) -> int:
        return len(self.offset) * len(self.points) * 4 * math.prod(self.value.shape[2:])

    def _scratch(self) -> tuple[Array, Array]:
        return aligned_empty((2 * loops.STRIP,), np.dtype(np.int32)), aligned_empty((2 * loops.STRIP,), self.dtype)
