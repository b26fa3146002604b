"""Which way a forward pass of deformable convolution goes, and with which tiles: everything that is a judgement.

What a way needs to be correct is kept apart from what makes it pay. Each requirement carries its reason, and none names
a particular shape: the choice holds for all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import gcd
from typing import NamedTuple

from dcnops._backends.cuda.constants import FUSED_STEP_BYTES, FUSED_TILE_ROWS, VECTOR_BYTES, ceil_div
from dcnops._backends.cuda.engine import Device
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformConvGeometry

_MAX_INDEX = 2**31
_LEAST_STEPS = 4


@dataclass(frozen=True)
class ForwardProblem:
    """What the choice depends on; `precision` is that of float32 products."""

    geometry: DeformConvGeometry
    dtype: str
    precision: str
    device: Device

    @property
    def segment(self) -> int:
        """Channels of a deformable group or of a weight group, whichever is smaller."""
        g = self.geometry
        return min(g.C // g.G, g.C // g.D)

    @property
    def alignment(self) -> int:
        """Channels that begin a group are a multiple of it."""
        g = self.geometry
        return gcd(g.C // g.G, g.C // g.D)

    @property
    def steps(self) -> int:
        """Steps of the inner axis of the fused kernel's products."""
        g = self.geometry
        return g.C // g.G // self.segment * g.K * ceil_div(self.segment * DTYPES[self.dtype].itemsize, FUSED_STEP_BYTES)

    @property
    def has_tensor_product(self) -> bool:
        return self.dtype in ("float16", "bfloat16") or (self.dtype == "float32" and self.precision != "ieee")

    def blocks(self, outputs: int) -> int:
        """Blocks of the fused kernel that compute so many outputs each."""
        g = self.geometry
        return ceil_div(g.N * g.pixels, FUSED_TILE_ROWS) * g.G * ceil_div(g.O // g.G, outputs)


class Requirement(NamedTuple):
    reason: str
    holds: Callable[[ForwardProblem], bool]


class FusedTiles(NamedTuple):
    """How the fused kernel is specialised."""

    product: str
    """A class of dcn/products.cuh."""
    suffix: str
    outputs: int
    """Output channels of a block."""
    blocks: int
    """Blocks that a multiprocessor has room for, by registers."""

    @property
    def by_warpgroups(self) -> bool:
        return self.product == "WarpgroupProduct"

    @property
    def threads(self) -> int:
        return 512 if self.outputs > {"WarpgroupProduct": 128, "FmaProduct": 64}.get(self.product, 256) else 256

    @property
    def rounds_filters(self) -> bool:
        """Whether the kernel takes float32 filters that are rounded to TF32."""
        return self.by_warpgroups and self.suffix == "tf32"

    @property
    def shared_bytes(self) -> int:
        """Two tiles of columns and of filters, the pixels' places and sampling weights, and what aligns them."""
        alignment = 1024 if self.by_warpgroups else 16
        tiles = 2 * (FUSED_TILE_ROWS + self.outputs) * FUSED_STEP_BYTES + FUSED_TILE_ROWS * (2 * 20 + 16)
        return ceil_div(tiles, alignment) * alignment + alignment - 16


FUSED_NEEDS = (
    Requirement(
        "asynchronous copies and the products of bfloat16 and TF32 begin with compute capability 8.0",
        lambda p: p.device.architecture >= 80,
    ),
    Requirement("sums are float32: float64 goes through columns", lambda p: p.dtype != "float64"),
    Requirement(
        "channels move 16 bytes at a time, all of them of one group",
        lambda p: p.alignment * DTYPES[p.dtype].itemsize % VECTOR_BYTES == 0,
    ),
    Requirement(
        "of a weight group and a deformable group one contains the other",
        lambda p: max(p.geometry.G, p.geometry.D) % min(p.geometry.G, p.geometry.D) == 0,
    ),
    Requirement(
        "an image is indexed with 32 bits",
        lambda p: max(p.geometry.H * p.geometry.W * p.geometry.C, p.geometry.pixels) < _MAX_INDEX,
    ),
    Requirement(
        "a block's tiles fit into shared memory",
        lambda p: FusedTiles("", "", 64, 1).shared_bytes <= p.device.shared_bytes,
    ),
)

FUSED_PAYS = (
    Requirement(
        "a step has room for 128 bytes of a group's channels: with less than half of them most of it is idle",
        lambda p: 2 * p.segment * DTYPES[p.dtype].itemsize >= FUSED_STEP_BYTES,
    ),
    Requirement(
        "a block computes 64 outputs of a weight group or more: with less than half of them most of it is idle",
        lambda p: p.geometry.O // p.geometry.G >= 32,
    ),
    Requirement(
        "without tensor cores a library's product is the better one as soon as the blocks fill the device twice; "
        "before, launches and the way through memory weigh more",
        lambda p: p.has_tensor_product or p.blocks(64) <= 2 * p.device.multiprocessors,
    ),
)


def failed(requirements: tuple[Requirement, ...], problem: ForwardProblem) -> list[str]:
    """The reasons of the requirements that a problem does not meet."""
    return [requirement.reason for requirement in requirements if not requirement.holds(problem)]


@functools.lru_cache(maxsize=256)
def choose_path(problem: ForwardProblem) -> str:
    """``fused`` or ``columns``."""
    return "columns" if failed(FUSED_NEEDS, problem) or failed(FUSED_PAYS, problem) else "fused"


@functools.lru_cache(maxsize=256)
def choose_tiles(problem: ForwardProblem) -> FusedTiles:
    """As wide as the outputs: the wider a block, the fewer times is a pixel sampled. Split sums make it more blocks."""
    outputs = problem.geometry.O // problem.geometry.G
    if problem.dtype == "float32" and problem.precision == "ieee":
        return FusedTiles("FmaProduct", "f32", 128 if outputs > 64 else 64, 1)
    if problem.dtype == "float32" and problem.precision == "3xtf32":
        return FusedTiles("SplitTensorProduct", "3xtf32", 64, 1)
    suffix = {"float16": "f16", "bfloat16": "bf16", "float32": "tf32"}[problem.dtype]
    # Only compute capability 9.0 has the instructions of warpgroups.
    product = "WarpgroupProduct" if problem.device.architecture == 90 else "TensorProduct"
    wide, middle, narrow = (FusedTiles(product, suffix, *size) for size in ((256, 1), (128, 2), (64, 2)))
    if outputs > 128 and wide.shared_bytes <= problem.device.shared_bytes:
        return wide
    return middle if outputs > 64 and middle.shared_bytes <= problem.device.shared_bytes else narrow


def choose_splits(problem: ForwardProblem, tiles: FusedTiles, partial_bytes: int) -> int:
    """Blocks that share the steps of an output, so that a small batch keeps all multiprocessors busy.

    Each writes its part of the sums, [rows, O] in float32, to scratch memory of which there are `partial_bytes`.
    """
    g = problem.geometry
    idle = problem.device.multiprocessors // max(1, problem.blocks(tiles.outputs))
    fit = partial_bytes // max(1, 4 * g.N * g.pixels * g.O)
    splits = min(idle, problem.steps // _LEAST_STEPS, fit)
    return splits if splits > 1 else 1


def choose_images(problem: ForwardProblem, tiles: FusedTiles, most: int) -> int:
    """Images of a group, at most so many: those with which the blocks of all groups take the fewest turns."""
    g = problem.geometry
    if most >= g.N:
        return g.N
    places = problem.device.multiprocessors * tiles.blocks

    def turns(images: int) -> int:
        groups, rest = divmod(g.N, images)
        full, last = (replace(problem, geometry=replace(g, N=count)).blocks(tiles.outputs) for count in (images, rest))
        return groups * ceil_div(full, places) + ceil_div(last, places)

    return min(range(most, most // 4, -1), key=turns)
