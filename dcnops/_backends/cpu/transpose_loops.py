"""Compiled loops that transpose images [n, R, S], with S pixels, to channels-last and back."""

from __future__ import annotations

from typing import Any

from dcnops._backends.cpu.compiled import kernel, smaller

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
        for r0 in range(0, R, 16):
            for r in range(r0, smaller(r0 + 16, R)):
                for s in range(first, last):
                    target[n, s, r] = source[n, r, s]


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
        for r0 in range(0, width, 16):
            for r in range(r0, smaller(r0 + 16, width)):
                for s in range(first, last):
                    target[n, c0 + r, s] = source[n, s, r]
