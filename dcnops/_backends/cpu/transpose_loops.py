"""Compiled loops that transpose images [n, R, S], with S pixels, to channels-last and back."""

from __future__ import annotations

from typing import Any

from dcnops._backends.cpu.compiled import kernel, smaller
from dcnops._backends.cpu.vectors import transpose

STRIP = 32
"""Values of s per work item."""


@kernel
def to_channels_last(source: Any, target: Any, begin: int, end: int) -> None:
    """Set ``target[n, s, r] = source[n, r, s]``; a work item is `STRIP` values of s for one n.

    Parameters
    ----------
    source : array [n, R, S]
    target : array [n, >= S, R]
    """
    R, S = source.shape[1:]
    strips = -(-S // STRIP)
    for item in range(begin, end):
        n = item // strips
        first = (item % strips) * STRIP
        last = smaller(first + STRIP, S)
        start = (n * target.shape[1] + first) * R
        transpose(source, n * R * S + first, S, R, last - first, target, start, R, 0, 1)


@kernel
def from_channels_last(source: Any, target: Any, c0: int, begin: int, end: int) -> None:
    """Set ``target[n, c0 + r, s] = source[n, s, r]``; a work item is `STRIP` values of s for one n.

    Parameters
    ----------
    source : array [n, S + 1, width]
    target : array [n, C, S]
    """
    width = source.shape[2]
    S = target.shape[2]
    strips = -(-S // STRIP)
    for item in range(begin, end):
        n = item // strips
        first = (item % strips) * STRIP
        last = smaller(first + STRIP, S)
        start = (n * target.shape[1] + c0) * S + first
        transpose(source, (n * (S + 1) + first) * width, width, last - first, width, target, start, S, 0, 1)
