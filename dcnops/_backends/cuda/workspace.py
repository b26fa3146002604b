"""Limit of the scratch memory of a call on a GPU."""

from __future__ import annotations

import operator
import os
from typing import SupportsIndex

from dcnops._errors import ArgumentError

WORKSPACE_BYTES = 128 * 2**20
"""Default limit. It is a constant: the number of chunks changes the order of float32 sums, so a limit that followed the
free memory would make results depend on what else is on the GPU."""

_VARIABLE = "DCNOPS_WORKSPACE"
_chosen: int | None = None


def set_workspace(nbytes: int | None) -> None:
    """Set the limit of the scratch memory of a call on a GPU, for all later calls of this process.

    Parameters
    ----------
    nbytes : int or None
        In bytes, at least 1. None restores the default: the environment variable ``DCNOPS_WORKSPACE``, in bytes too, or
        128 MiB.

    Raises
    ------
    ArgumentError
        `nbytes` is not a positive integer.

    Notes
    -----
    A backward convolution, and a forward one in float32 without TF32, process their columns (im2col) in chunks that fit
    the limit. A larger limit means fewer launches and products, which pays for batches of many images. A single image
    may need more than the limit, and what the weights need does not count. Deterministic gradients of RoI pooling,
    attention and aggregation work in parts that fit the limit, too. Results depend on the limit only in the order of
    sums, that is, in their last digits.

    Examples
    --------
    >>> import dcnops
    >>> dcnops.set_workspace(512 * 2**20)
    >>> dcnops.get_workspace()
    536870912
    >>> dcnops.set_workspace(None)
    """
    global _chosen
    _chosen = None if nbytes is None else _positive("nbytes", nbytes)


def get_workspace() -> int:
    """Return the limit of the scratch memory of a call on a GPU, see `set_workspace`.

    Returns
    -------
    int
        In bytes.

    Raises
    ------
    ArgumentError
        The environment variable ``DCNOPS_WORKSPACE`` is not a positive number of bytes.

    Examples
    --------
    >>> import dcnops
    >>> dcnops.get_workspace() // 2**20
    128
    """
    global _chosen
    if _chosen is None:
        value = os.environ.get(_VARIABLE)
        number: object = int(value) if value and value.isdecimal() else value
        _chosen = _positive(_VARIABLE, number) if value else WORKSPACE_BYTES
    return _chosen


def _positive(name: str, value: object) -> int:
    if isinstance(value, SupportsIndex) and not isinstance(value, bool) and operator.index(value) > 0:
        return operator.index(value)
    raise ArgumentError(f"{name} must be a positive number of bytes, got {value!r}")
