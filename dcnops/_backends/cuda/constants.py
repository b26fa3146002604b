"""Constants of all launch plans. The test of shared constants compares those that the CUDA sources repeat."""

from __future__ import annotations

WORKSPACE_BYTES = 32 * 2**20
"""Limit of the scratch memory of a call, in bytes: this much stays in the L2 cache of a large GPU.

A call whose smallest piece of work needs more takes what that piece needs.
"""

VECTOR_BYTES = 16
"""Bytes of the widest load or store of a thread."""

WARP = 32
THREADS = 256
"""Threads of a block."""

MAX_BLOCKS = 2**20
MAX_ROWS = 2**30


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)
