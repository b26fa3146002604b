"""Transposition of images to channels-last and back, and of weights, by one compiled loop.

The functions return jobs ``(kernel, items, *args)`` for `parallel` and `parallel_jobs`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dcnops._backends.cpu.compiled import smaller, vector_kernel
from dcnops._backends.cpu.vectors import transpose

_STRIP = 32
"""Pixels, or output channels of weights, per work item."""


@vector_kernel
def _transpose_strips(source: Any, target: Any, sizes: Any, begin: int, end: int) -> None:
    """Copy the rows of matrices in `source` to columns in `target`; a work item is a part of a matrix.

    Parameters
    ----------
    source, target : array, 1-D
    sizes : tuple of int
        Rows and columns of a matrix. Rows and columns of a work item. Elements from matrix to matrix and from row to
        row in `source`. Elements from matrix to matrix and from row to row in `target`, of which the latter is only
        used between work items. The arguments `outer`, `inner` and `period` of `transpose`.
    """
    rows, columns, part_rows, part_columns, matrix, row, target_matrix, target_row, outer, inner, period = sizes
    across = -(-columns // part_columns)
    parts = -(-rows // part_rows) * across
    for item in range(begin, end):
        n = item // parts
        i = item % parts // across * part_rows
        j = item % across * part_columns
        transpose(
            source, n * matrix + i * row + j, row, smaller(part_rows, rows - i), smaller(part_columns, columns - j),
            target, n * target_matrix + i * target_row + j * outer, outer, inner, period,
        )  # fmt: skip


def to_channels_last(source: Any, target: Any) -> tuple[Any, ...]:
    """Return the job ``target[n, s, r] = source[n, r, s]``.

    Parameters
    ----------
    source : array [n, R, S]
    target : array [n, >= S, R]
    """
    count, R, S = source.shape
    sizes = R, S, max(R, 1), _STRIP, R * S, S, math.prod(target.shape[1:]), 1, R, 0, 1
    return _transpose_strips, count * -(-S // _STRIP), source.reshape(-1), target.reshape(-1), sizes


def from_channels_last(source: Any, target: Any, c0: int) -> tuple[Any, ...]:
    """Return the job ``target[n, c0 + r, s] = source[n, s, r]``.

    Parameters
    ----------
    source : array [n, >= S, width]
    target : array [n, C, S]
    """
    count, C, S = target.shape
    width = source.shape[2]
    sizes = S, width, _STRIP, max(width, 1), math.prod(source.shape[1:]), width, C * S, 1, S, 0, 1
    return _transpose_strips, count * -(-S // _STRIP), source.reshape(-1), target.reshape(-1)[c0 * S :], sizes


def pack_weight(weight: Any, packed: Any, g0: int, c0: int, cw: int, og: int) -> tuple[Any, ...]:
    """Return the job ``packed[g, panel, k*cw + c, lane] = weight[(g0+g)*og + panel*lanes + lane, c0 + c, k]``.

    The lanes beyond the last output channel are set to 0 at once.

    Parameters
    ----------
    weight : array [G*og, C/G, K]
    packed : array [Gb, panels, K*cw, lanes]
    """
    Gb, panels, length, lanes = packed.shape
    row = math.prod(weight.shape[1:])
    K = weight.shape[2]
    if og % lanes:
        packed[:, -1] = 0
    sizes = og, cw * K, lanes, cw * K, og * row, row, panels * length * lanes, length, lanes, cw * lanes, K
    start = g0 * og * row + c0 * K
    return _transpose_strips, Gb * panels, weight.reshape(-1)[start:], packed.reshape(-1), sizes


def pack_weight_transposed(weight: Any, packed: Any, g0: int, c0: int, cw: int) -> tuple[tuple[Any, ...], ...]:
    """Return two jobs: ``packed[g, panel, o, lane] = weight[(g0+g)*og + o, c0 + c, k]``.

    Here k*cw + c = panel*lanes + lane. The second job follows the first. The lanes beyond the last (k, c) are set to 0
    at once.

    Parameters
    ----------
    weight : array [G*og, C/G, K]
    packed : array [Gb, panels, og, lanes]
    """
    Gb, panels, og, lanes = packed.shape
    channels, K = weight.shape[1:]
    row, length = channels * K, cw * K
    if length % lanes:
        packed[:, -1] = 0
    columns = np.empty(Gb * length * og, packed.dtype)  # [Gb, K*cw, og]
    to_columns = og, length, _STRIP, length, og * row, row, length * og, 1, og, cw * og, K
    to_rows = length, og, lanes, max(og, 1), length * og, og, panels * og * lanes, og, lanes, 0, 1
    source = weight.reshape(-1)[g0 * og * row + c0 * K :]
    return (
        (_transpose_strips, Gb * -(-og // _STRIP), source, columns, to_columns),
        (_transpose_strips, Gb * panels, columns, packed.reshape(-1), to_rows),
    )


def unpack_weight(gradient: Any, weight: Any, g0: int, c0: int, cw: int, og: int) -> tuple[tuple[Any, ...], ...]:
    """Return two jobs: ``weight[(g0+g)*og + o, c0 + c, k] = gradient[g, o, k*cw + c]``. The second follows the first.

    Parameters
    ----------
    gradient : array [Gb, >= og, >= K*cw]
    weight : array [G*og, C/G, K]
    """
    Gb, rows, padded = gradient.shape
    channels, K = weight.shape[1:]
    row, length = channels * K, cw * K
    columns = np.empty(Gb * length * og, weight.dtype)  # [Gb, cw*K, og]
    to_columns = og, length, _STRIP, length, rows * padded, padded, length * og, 1, og, K * og, cw
    to_rows = length, og, _STRIP, max(og, 1), length * og, og, og * row, 1, row, 0, 1
    target = weight.reshape(-1)[g0 * og * row + c0 * K :]
    return (
        (_transpose_strips, Gb * -(-og // _STRIP), gradient.reshape(-1), columns, to_columns),
        (_transpose_strips, Gb * -(-length // _STRIP), columns, target, to_rows),
    )
