"""Heuristics: which algorithm a pass of deformable convolution runs, how it is tiled, how much scratch memory it uses.

Requirements of correctness (`FUSED_NEEDS`) are kept apart from those of speed (`FUSED_PAYS`). Each states its reason,
and none names a particular shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

from dcnops._backends.cuda.engine import Device
from dcnops._backends.cuda.kernel_constants import FUSED_STEP_BYTES, FUSED_TILE_ROWS, VECTOR_BYTES, ceil_div
from dcnops._dtypes import DTYPES
from dcnops._shapes import DeformConvGeometry

LISTED_CHANNELS = 32
"""Minimum channels per deformable group for gathering the gradient of the input by lists instead of scattering it.

With fewer channels, a list entry costs about as much as the channels that it refers to.
"""

_MAX_INDEX = 2**31
_MIN_STEPS = 4


@dataclass(frozen=True)
class ForwardProblem:
    """Signature of a forward pass; `precision` is that of float32 products."""

    geometry: DeformConvGeometry
    dtype: str
    precision: str
    device: Device

    @property
    def segment(self) -> int:
        """Channels of a deformable group or of a weight group, whichever has fewer."""
        g = self.geometry
        return min(g.C // g.G, g.C // g.D)

    @property
    def alignment(self) -> int:
        """Greatest number that divides the index of every channel that begins a group."""
        g = self.geometry
        return gcd(g.C // g.G, g.C // g.D)

    @property
    def steps(self) -> int:
        """Steps along the inner axis of the fused kernel's products."""
        g = self.geometry
        return g.C // g.G // self.segment * g.K * ceil_div(self.segment * DTYPES[self.dtype].itemsize, FUSED_STEP_BYTES)

    @property
    def has_tensor_product(self) -> bool:
        return DTYPES[self.dtype].is_16_bit or (self.dtype == "float32" and self.precision != "ieee")

    def blocks(self, outputs: int) -> int:
        """Return the number of blocks of the fused kernel if each computes that many outputs."""
        g = self.geometry
        return ceil_div(g.N * g.pixels, FUSED_TILE_ROWS) * g.G * ceil_div(g.O // g.G, outputs)


class Requirement(NamedTuple):
    """Condition for choosing the fused kernel."""

    reason: str
    holds: Callable[[ForwardProblem], bool]


class FusedTiles(NamedTuple):
    """Specialisation of the fused kernel."""

    product: str
    """Class in dcn/products.cuh."""
    suffix: str
    outputs: int
    """Output channels of a block."""
    blocks: int
    """Blocks that fit a multiprocessor at a time, by their registers."""

    @property
    def by_warpgroups(self) -> bool:
        return self.product == "WarpgroupProduct"

    @property
    def threads(self) -> int:
        return 512 if self.outputs > {"WarpgroupProduct": 128, "FmaProduct": 64}.get(self.product, 256) else 256

    @property
    def rounds_filters(self) -> bool:
        """True if float32 filters must be rounded to TF32 before the launch."""
        return self.by_warpgroups and self.suffix == "tf32"

    @property
    def shared_bytes(self) -> int:
        """Two tiles of columns and of filters, locations and sampling weights of the pixels, and alignment."""
        alignment = 1024 if self.by_warpgroups else 16
        tiles = 2 * (FUSED_TILE_ROWS + self.outputs) * FUSED_STEP_BYTES + FUSED_TILE_ROWS * (2 * 20 + 16)
        return ceil_div(tiles, alignment) * alignment + alignment - 16


FUSED_NEEDS = (
    Requirement(
        "asynchronous copies and products of bfloat16 and TF32 need compute capability 8.0",
        lambda p: p.device.architecture >= 80,
    ),
    Requirement("sums are float32: float64 goes through columns", lambda p: p.dtype != "float64"),
    Requirement(
        "channels move 16 bytes at a time, which must belong to one group",
        lambda p: p.alignment * DTYPES[p.dtype].itemsize % VECTOR_BYTES == 0,
    ),
    Requirement(
        "of a weight group and a deformable group, one contains the other",
        lambda p: max(p.geometry.G, p.geometry.D) % min(p.geometry.G, p.geometry.D) == 0,
    ),
    Requirement(
        "pixels and channels of an image are indexed with 32 bits",
        lambda p: max(p.geometry.H * p.geometry.W * p.geometry.C, p.geometry.pixels) < _MAX_INDEX,
    ),
    Requirement(
        "the tiles of a block must fit into shared memory",
        lambda p: FusedTiles("", "", 64, 1).shared_bytes <= p.device.shared_bytes,
    ),
)

FUSED_PAYS = (
    Requirement(
        "a step covers 128 bytes of the channels of a group: with less than half of that, most of it is idle",
        lambda p: 2 * p.segment * DTYPES[p.dtype].itemsize >= FUSED_STEP_BYTES,
    ),
    Requirement(
        "a block computes at least 64 outputs of a weight group: with less than half of them, most of it is idle",
        lambda p: p.geometry.O // p.geometry.G >= 32,
    ),
    Requirement(
        "without tensor cores cuBLAS is faster once the blocks fill the device twice; "
        "below that, launches and memory traffic weigh more",
        lambda p: p.has_tensor_product or p.blocks(64) <= 2 * p.device.multiprocessors,
    ),
)


def reasons_against(requirements: tuple[Requirement, ...], problem: ForwardProblem) -> list[str]:
    """Return the reasons behind the requirements that a problem does not meet."""
    return [requirement.reason for requirement in requirements if not requirement.holds(problem)]


@functools.lru_cache(maxsize=256)
def choose_path(problem: ForwardProblem) -> str:
    """Return ``fused`` or ``columns``."""
    return "columns" if reasons_against(FUSED_NEEDS + FUSED_PAYS, problem) else "fused"


def gathers_input(geometry: DeformConvGeometry, deterministic: bool) -> bool:
    """Return True if the gradient of the input is gathered by lists, False if it is scattered by atomic additions."""
    return deterministic or geometry.C // geometry.D >= LISTED_CHANNELS


@functools.lru_cache(maxsize=256)
def choose_tiles(problem: ForwardProblem) -> FusedTiles:
    """Choose tiles as wide as the outputs.

    Wider blocks sample each pixel fewer times. If that leaves too few blocks, `choose_splits` makes more of them.
    """
    outputs = problem.geometry.O // problem.geometry.G
    if problem.dtype == "float32" and problem.precision == "ieee":
        return FusedTiles("FmaProduct", "f32", 128 if outputs > 64 else 64, 1)
    if problem.dtype == "float32" and problem.precision == "3xtf32":
        return FusedTiles("SplitTensorProduct", "3xtf32", 64, 1)
    suffix = "tf32" if problem.dtype == "float32" else DTYPES[problem.dtype].suffix
    # Only compute capability 9.0 has warpgroup instructions.
    product = "WarpgroupProduct" if problem.device.architecture == 90 else "TensorProduct"
    wide, middle, narrow = (FusedTiles(product, suffix, *size) for size in ((256, 1), (128, 2), (64, 2)))
    if outputs > 128 and wide.shared_bytes <= problem.device.shared_bytes:
        return wide
    return middle if outputs > 64 and middle.shared_bytes <= problem.device.shared_bytes else narrow


def choose_splits(problem: ForwardProblem, tiles: FusedTiles, partial_bytes: int) -> int:
    """Choose split-K: how many blocks share the steps of an output, so that small batches fill the device.

    Each writes its partial sums, [rows, O] in float32, to scratch memory of at most `partial_bytes`.
    """
    g = problem.geometry
    idle = problem.device.multiprocessors // max(1, problem.blocks(tiles.outputs))
    fit = partial_bytes // max(1, 4 * g.N * g.pixels * g.O)
    splits = min(idle, problem.steps // _MIN_STEPS, fit)
    return splits if splits > 1 else 1


def choose_group_size(problem: ForwardProblem, tiles: FusedTiles, most: int) -> int:
    """Choose the number of images per group, up to `most`, so that the blocks of all groups run in the fewest waves."""
    g = problem.geometry
    if most >= g.N:
        return g.N
    concurrent = problem.device.multiprocessors * tiles.blocks

    def waves(images: int) -> int:
        groups, rest = divmod(g.N, images)
        full, last = (replace(problem, geometry=replace(g, N=count)).blocks(tiles.outputs) for count in (images, rest))
        return groups * ceil_div(full, concurrent) + ceil_div(last, concurrent)

    return min(range(most, most // 4, -1), key=waves)
