"""Constants of the launch plans.

The CUDA sources repeat some of them. `SHARED_CONSTANTS` in tests/cuda/kernel_matrix.py lists the pairs for a test.
"""

from __future__ import annotations

VECTOR_BYTES = 16
"""Bytes of the widest load or store of a thread."""

WARP = 32

THREADS = 256
"""Threads of a block of every kernel but the fused convolution."""

MAX_BLOCKS = 2**20
MAX_ROWS = 2**30

# Array jobs.

MAX_ARRAY_JOBS = 6
"""Jobs of one launch."""

TRANSPOSE_TILE_SIDE = {2: 64, 4: 64, 8: 32}
"""Pixels and channels of a tile of a transpose, by the size of an element."""

ARRAY_JOBS_SHARED_BYTES = 64 * 65 * 4
"""Shared memory of a block that runs array jobs: the largest tile of a transpose."""

SUM_TILE_CHANNELS = 32
"""Channels of a tile of a sum over rows."""

FILL_TILE_ELEMENTS = 4096

WIDE_TILE_ELEMENTS = 4096
"""Elements of a tile of a transpose in the type of sums."""

# The fused forward convolution.

FUSED_TILE_ROWS = 128
"""Output pixels of a block."""

FUSED_SLICE_OUTPUTS = 64
"""Outputs that a block writes at once; the outputs of a block are a multiple of it."""

FUSED_STEP_BYTES = 128
"""Bytes of channels of one group that a step of the products reads from each pixel."""

# The backward convolution.

BAND_ROWS = 8
"""Rows of a band of sampling points."""

LISTS_PER_THREAD = 16
"""Lists that a thread starts at a time."""

LIST_PART_BYTES = 16
"""Bytes of the description of a part of a long list."""

# RoI pooling. Shared memory is counted in elements of the type of sums.

ROI_WARP_PIXELS = 224
"""Shared memory of a warp for the pixels of its bin."""

ROI_BIN_DOTS = 4
"""Shared memory of a bin for its dot products."""

ROI_BOUNDS_INTS = 5
"""Integers of the bounds of a region."""


# Attention and aggregation.

ATTENTION_LEVEL_BYTES = 16
"""Shared memory of a level."""

ATTENTION_POINTS_PER_LANE = 2
"""Sampling points that a thread prepares at a time."""


def attention_point_bytes(sum_bytes: int) -> int:
    """Return the shared memory of a sampling point."""
    return 48 if sum_bytes == 8 else 32


# Deterministic sums over strips of pixels.

STRIP_PADDING = 4
"""Shared memory between the pixels of a strip, in elements of the type of sums."""


def strip_pixels(sum_bytes: int, vector: int) -> int:
    """Return the pixels of a strip: the sums of a thread must fit registers."""
    return 2 if sum_bytes == 8 else 4 if vector == 8 else 8


def ceil_div(a: int, b: int) -> int:
    """Return ``a / b`` rounded up."""
    return -(-a // b)
