"""Deformable convolution on NumPy arrays.

Images are processed in blocks of channels: a block is copied to channels-last, and threads then take small tiles of
output pixels from sampling to the finished matrix product, so that the sampled columns never leave the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcnops._backends.cpu import deform_conv2d_loops as loops
from dcnops._backends.cpu import transpose_loops
from dcnops._backends.cpu.arrays import Array, Staged, empty, plain, round_up, rounded, strips, sum_dtype
from dcnops._backends.cpu.threads import PIECES_PER_THREAD, THREADS, alone_below, parallel
from dcnops._explain import LOGGER
from dcnops._geometry import DeformConvGeometry

_CHANNELS_PER_THREAD = 16

# Tuned at 2 MB of L2 per core; half and twice of each change little.
_BLOCK_CHANNELS = 128
_LEAST_BLOCK_CHANNELS = 32
_TILE_PIXELS = 16 * loops.ROWS
_TILE_BYTES = 2**19
_SPAN_BYTES = 2**23
_PART_PIXELS = 2048
_PANELS_TOGETHER = 5

_NO_MASK = {name: np.empty((0, 0, 0), name) for name in ("float32", "float64")}


@dataclass(frozen=True)
class _Block:
    """Channels that are processed together: some of one weight group, or all of several groups."""

    c0: int
    """First channel."""
    width: int
    """Channels."""
    g0: int
    """First weight group."""
    Gb: int
    """Weight groups."""
    group_c0: int
    """First channel within the first weight group."""
    cw: int
    """Channels of the block in each of its weight groups."""
    o0: int
    """First output of the first weight group."""


def _blocks(geometry: DeformConvGeometry, limit: int) -> Iterator[_Block]:
    """All channels in blocks of at most `limit`."""
    channels = geometry.C // geometry.G
    og = geometry.O // geometry.G
    if channels > limit:
        parts = -(-channels // limit)
        cw = round_up(-(-channels // parts), _CHANNELS_PER_THREAD)
        for g in range(geometry.G):
            for c in range(0, channels, cw):
                width = min(cw, channels - c)
                yield _Block(g * channels + c, width, g, 1, c, width, g * og)
    else:
        groups = limit // channels
        for g in range(0, geometry.G, groups):
            Gb = min(groups, geometry.G - g)
            yield _Block(g * channels, Gb * channels, g, Gb, 0, channels, g * og)


def _tile(pixels: int, bytes_per_pixel: int) -> int:
    """Pixels of a tile: fits the cache, leaves work for every thread, and is a multiple of ROWS."""
    share = -(-pixels // (THREADS * PIECES_PER_THREAD))
    return max(1, min(_TILE_PIXELS, _TILE_BYTES // bytes_per_pixel, share) // loops.ROWS) * loops.ROWS


@dataclass(frozen=True)
class _Part:
    """The arguments of both directions for some images, and what follows from them."""

    geometry: DeformConvGeometry
    dtype: np.dtype[Any]
    """The dtype of computation."""
    input: Array
    """[n, C, H, W], in any form."""
    offset: Array
    """[n, 2*D*K, oh*ow]"""
    mask: Array
    """[n, D*K, oh*ow], or of size 0 for none."""
    weight: Array
    """[O, C/G, K]"""

    @property
    def pixels(self) -> int:
        """Output pixels of all images."""
        return len(self.input) * self.geometry.pixels

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the compiled loops know of the geometry."""
        g = self.geometry
        return (g.H, g.W, g.ow, g.kh, g.kw, g.sh, g.sw, g.dh, g.dw, g.pad_top, g.pad_left, g.C // g.D)


def _plan(part: _Part) -> tuple[Array, Array]:
    """Scratch for a plan of the compiled loops."""
    K = part.geometry.K
    return empty((K, 4 * loops.STRIP), np.dtype(np.int32)), empty((K, 7 * loops.STRIP), part.dtype)


def _channels_last(part: _Part, block: _Block) -> Array:
    """Channels-last copy of a block, [n, H*W + 1, width], with a zero pixel at the end of each image."""
    count, extent = len(part.input), part.geometry.H * part.geometry.W
    source = plain(part.input[:, block.c0 : block.c0 + block.width], part.dtype, count, block.width, extent)
    image = empty((count, extent + 1, block.width), part.dtype)
    image[:, extent] = 0
    parallel(transpose_loops.to_channels_last, strips(count, extent), source, image)
    return image


def _parts(
    geometry: DeformConvGeometry, input: Array, offset: Array, weight: Array, mask: Array | None
) -> Iterator[tuple[slice, _Part]]:
    """Images that are processed together: several of them if they are tiny."""
    g = geometry
    dtype = sum_dtype(input)
    plain_weight = plain(weight, dtype, g.O, g.C // g.G, g.K)
    together = max(1, _PART_PIXELS // max(g.pixels, g.H * g.W))
    for n in range(0, g.N, together):
        images = slice(n, min(n + together, g.N))
        count = images.stop - n
        yield (
            images,
            _Part(
                geometry,
                dtype,
                input[images],
                plain(offset[images], dtype, count, 2 * g.D * g.K, g.pixels),
                _NO_MASK[dtype.name] if mask is None else plain(mask[images], dtype, count, g.D * g.K, g.pixels),
                plain_weight,
            ),
        )


def deform_conv2d(
    geometry: DeformConvGeometry,
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
    precision: str | None,
) -> Array:
    """Deformable convolution; the arguments are those of `dcnops.deform_conv2d`, checked. All precision is "ieee"."""
    g = geometry
    out = np.empty(g.output_shape, input.dtype)
    # Half the channels at most, where that is enough to vectorise: the copies stay small beside the image itself.
    limit = max(_LEAST_BLOCK_CHANNELS, min(_BLOCK_CHANNELS, g.C // 2))
    with alone_below(_multiply_adds(g)):
        for images, part in _parts(geometry, input, offset, weight, mask):
            plain_bias = np.zeros(g.O, part.dtype) if bias is None else plain(bias, part.dtype, g.O)
            target = Staged(out[images], part.dtype)
            for block in _blocks(geometry, limit):
                _add_outputs(part, block, plain_bias, target.array)
            target.store()
    return out


def _multiply_adds(geometry: DeformConvGeometry) -> int:
    g = geometry
    return g.N * g.pixels * g.O * g.K * g.C // g.G


def _add_outputs(part: _Part, block: _Block, bias: Array, out: Array) -> None:
    """Write a block's share of the outputs, or add it to what earlier blocks of the weight group wrote."""
    dtype = part.dtype
    lanes = loops.panel_lanes(dtype.itemsize)
    og = part.geometry.O // part.geometry.G
    panels = -(-og // lanes)
    length = part.geometry.K * block.cw
    image = _channels_last(part, block)
    packed = empty((block.Gb, panels, length, lanes), dtype)
    parallel(loops.pack_weight, block.Gb * panels, part.weight, packed, block.g0, block.group_c0, block.cw, og)
    tile = _tile(part.pixels, block.Gb * (length + panels * lanes) * dtype.itemsize)
    LOGGER.debug("%d channels, %d pixels in tiles of %d, %d threads", block.width, part.pixels, tile, THREADS)

    def scratch() -> tuple[Any, ...]:
        return _plan(part), empty((block.Gb, tile, length), dtype), empty((block.Gb, tile, panels * lanes), dtype)

    parallel(
        loops.output_tile, -(-part.pixels // tile),
        part.sizes, image, part.offset, part.mask, packed, bias, out,
        block.c0, block.cw, block.o0, og, block.group_c0 > 0, tile,
        scratch=scratch,
    )  # fmt: skip


def deform_conv2d_backward(
    geometry: DeformConvGeometry,
    grad_out: Array,
    input: Array,
    offset: Array,
    weight: Array,
    mask: Array | None,
    needs: frozenset[str],
    deterministic: bool,
    precision: str | None,
) -> dict[str, Array]:
    """Gradients of `deform_conv2d` by the name of the argument, those in `needs`; deterministic and "ieee" always."""
    g = geometry
    og = g.O // g.G
    dtype = sum_dtype(input)
    lanes = loops.panel_lanes(dtype.itemsize)
    blocks = list(_blocks(geometry, _BLOCK_CHANNELS))

    results = {}
    if "input" in needs:
        results["input"] = np.empty(input.shape, input.dtype)
    if "offset" in needs:
        results["offset"] = np.zeros(offset.shape, offset.dtype)
    if "mask" in needs and mask is not None:
        results["mask"] = np.zeros(mask.shape, mask.dtype)
    grad_bias = np.zeros(g.O, dtype)
    grad_weights: list[Array | None] = [None for _ in blocks]
    if "weight" in needs:
        rows = round_up(og, loops.ROWS)
        grad_weights = [np.zeros((block.Gb, rows, round_up(g.K * block.cw, lanes)), dtype) for block in blocks]

    with alone_below(2 * _multiply_adds(g)):
        for images, part in _parts(geometry, input, offset, weight, mask):
            gradient = plain(grad_out[images], dtype, len(part.input), g.O, g.pixels)
            if "bias" in needs:
                grad_bias += gradient.sum(axis=(0, 2))
            targets = {name: Staged(result[images], dtype) for name, result in results.items()}
            if targets or "weight" in needs:
                arrays = {name: target.array for name, target in targets.items()}
                _add_gradients(part, gradient, blocks, arrays, grad_weights)
            for target in targets.values():
                target.store()

    if "bias" in needs:
        results["bias"] = rounded(grad_bias, input.dtype)
    if "weight" in needs:
        grad_weight = np.empty((g.O, g.C // g.G, g.K), dtype)
        for block, accumulated in zip(blocks, grad_weights):
            parallel(
                loops.unpack_weight, block.Gb * og, accumulated, grad_weight, block.g0, block.group_c0, block.cw, og
            )  # fmt: skip
        results["weight"] = rounded(grad_weight, input.dtype).reshape(weight.shape)
    return results


def _add_gradients(
    part: _Part, grad_out: Array, blocks: list[_Block], targets: dict[str, Array], grad_weights: list[Array | None]
) -> None:
    """Gradients of some images.

    Parameters
    ----------
    part : _Part
    grad_out : array [n, O, oh*ow]
    blocks : list of _Block
    targets : dict
        Arrays to write the gradient of "input" to, and to add those of "offset" and "mask" to; each may be missing.
    grad_weights : list of array [Gb, og rounded up, K*cw rounded up] or None
        What to add the weight gradient of each block to.
    """
    g, dtype = part.geometry, part.dtype
    grad_last = None
    if targets:
        grad_last = empty((len(grad_out), g.pixels, g.O), dtype)
        parallel(transpose_loops.to_channels_last, strips(len(grad_out), g.pixels), grad_out, grad_last)
        grad_last = grad_last.reshape(part.pixels, g.O)
    if targets.keys() & {"offset", "mask"}:
        targets.setdefault("offset", np.zeros_like(part.offset))
        targets.setdefault("mask", _NO_MASK[dtype.name])
    for block, grad_weight in zip(blocks, grad_weights):
        _add_block_gradients(part, block, grad_out, grad_last, targets, grad_weight)


def _add_block_gradients(
    part: _Part,
    block: _Block,
    grad_out: Array,
    grad_last: Array | None,
    targets: dict[str, Array],
    grad_weight: Array | None,
) -> None:
    """One block's share of the gradients of some images, in spans of output pixels whose columns fit a cache."""
    g, dtype, sizes = part.geometry, part.dtype, part.sizes
    og = g.O // g.G
    lanes = loops.panel_lanes(dtype.itemsize)
    padded = round_up(g.K * block.cw, lanes)
    panels = padded // lanes
    row_bytes = block.Gb * padded * dtype.itemsize
    tile = _tile(part.pixels, row_bytes)
    span = min(round_up(part.pixels, tile), max(1, _SPAN_BYTES // row_bytes // tile) * tile)
    LOGGER.debug(
        "%d channels, %d pixels in spans of %d and tiles of %d, %d threads",
        block.width, part.pixels, span, tile, THREADS,
    )  # fmt: skip

    image = packed = gradients = grad_image = None
    if grad_weight is not None or "offset" in targets:
        image = _channels_last(part, block)
    if grad_last is not None:
        gradients = empty((block.Gb, span, padded), dtype)
        packed = empty((block.Gb, panels, og, lanes), dtype)
        parallel(loops.pack_weight_transposed, block.Gb * og, part.weight, packed, block.g0, block.group_c0, block.cw)
    if "input" in targets:
        grad_image = empty((len(part.input), g.H * g.W + 1, block.width), dtype)
        parallel(lambda begin, end: grad_image[:, begin:end].fill(0), g.H * g.W + 1)

    def fill_tiles(first: int, last: int, plan: tuple[Array, Array], begin: int, end: int) -> None:
        loops.column_gradients(grad_last, packed, gradients, block.o0, first, last, tile, begin, end)
        if "offset" in targets:
            loops.sampling_gradients(
                sizes, image, part.offset, part.mask, gradients, targets["offset"], targets["mask"],
                block.c0, block.cw, first, plan, begin * tile, min(end * tile, last - first),
            )  # fmt: skip

    for first in range(0, part.pixels if targets else 0, span):
        last = min(first + span, part.pixels)
        parallel(fill_tiles, -(-(last - first) // tile), first, last, scratch=lambda: (_plan(part),))
        if grad_image is not None:
            parallel(
                loops.scatter_columns, block.width,
                sizes, part.offset, part.mask, gradients, grad_image, block.c0, block.cw, first, last,
                scratch=lambda: (_plan(part),), pieces_per_thread=1, least=_CHANNELS_PER_THREAD,
            )  # fmt: skip
    if grad_weight is not None:
        # An odd number, lest rows of the columns fall into few sets of the first-level cache.
        together = min(_PANELS_TOGETHER, block.Gb * panels // THREADS) | 1
        parallel(
            loops.weight_gradient, block.Gb * -(-panels // together),
            sizes, image, part.offset, part.mask, grad_out, grad_weight, block.c0, block.cw, block.o0, og,
            scratch=lambda: (_plan(part), empty((1, loops.DEPTH, together * lanes), dtype)),
        )  # fmt: skip
    if grad_image is not None:
        items = strips(len(part.input), g.H * g.W)
        parallel(transpose_loops.from_channels_last, items, grad_image, targets["input"], block.c0)
