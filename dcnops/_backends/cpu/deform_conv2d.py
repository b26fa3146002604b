"""Deformable convolution on NumPy arrays.

Images are processed in blocks of channels. Each block is copied to channels-last. Threads then process small tiles of
output pixels, from sampling to the finished matrix product, so that the im2col columns never leave the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dcnops._backends.cpu import deform_conv2d_loops as loops
from dcnops._backends.cpu import vectors
from dcnops._backends.cpu.arrays import (
    CHANNELS_PER_THREAD,
    Array,
    StagedResult,
    aligned_empty,
    compute_dtype,
    loop_array,
    round_up,
    rounded,
)
from dcnops._backends.cpu.compiled import quiet
from dcnops._backends.cpu.threads import PIECES_PER_THREAD, parallel, parallel_jobs, serial_if_small
from dcnops._backends.cpu.transpose_loops import (
    from_channels_last,
    pack_weight,
    pack_weight_transposed,
    to_channels_last,
    unpack_weight,
)
from dcnops._explain import LOGGER
from dcnops._shapes import DeformConvGeometry
from dcnops._threads import threads_of_call

# Tuned for 2 MB of L2 cache per core. Halving or doubling a value changes little.
_BLOCK_CHANNELS = 128
_LEAST_BLOCK_CHANNELS = 32
_SMALL_COPY_BYTES = 2**21
_TILE_PIXELS = 16 * vectors.ROWS
_TILE_BYTES = 2**19
_SMALL_COLUMN_BYTES = _TILE_BYTES // (_TILE_PIXELS // 2)
_SPAN_BYTES = 2**23
_CHUNK_PIXELS = 2048

_NO_MASK = {name: np.empty((0, 0, 0), name) for name in ("float32", "float64")}


@dataclass(frozen=True)
class _Block:
    """Block of channels: part of one weight group, or several whole groups."""

    c0: int  # first channel
    width: int  # number of channels
    g0: int  # first weight group
    Gb: int  # number of weight groups
    group_c0: int  # first channel within the first weight group
    cw: int  # channels of the block per weight group
    o0: int  # first output channel of the first weight group


def _blocks(geometry: DeformConvGeometry, limit: int) -> Iterator[_Block]:
    """Split all channels into blocks of at most `limit`."""
    channels = geometry.C // geometry.G
    og = geometry.O // geometry.G
    if channels > limit:
        parts = -(-channels // limit)
        cw = round_up(-(-channels // parts), CHANNELS_PER_THREAD)
        for g in range(geometry.G):
            for c in range(0, channels, cw):
                width = min(cw, channels - c)
                yield _Block(g * channels + c, width, g, 1, c, width, g * og)
    else:
        groups = limit // channels
        for g in range(0, geometry.G, groups):
            Gb = min(groups, geometry.G - g)
            yield _Block(g * channels, Gb * channels, g, Gb, 0, channels, g * og)


def _choose_tile(pixels: int, bytes_per_pixel: int) -> int:
    """Return the pixels per tile: a multiple of ROWS that fits the cache and leaves work for every thread."""
    share = -(-pixels // (threads_of_call() * PIECES_PER_THREAD))
    return max(1, min(_TILE_PIXELS, _TILE_BYTES // bytes_per_pixel, share) // vectors.ROWS) * vectors.ROWS


@dataclass(frozen=True)
class _Chunk:
    """Arguments of the forward and backward pass for a chunk of images."""

    geometry: DeformConvGeometry
    dtype: np.dtype[Any]  # dtype of computation
    input: Array  # [n, C, H, W], with any strides and of any dtype
    offset: Array  # [n, 2*D*K, oh*ow]
    mask: Array  # [n, D*K, oh*ow], or an empty array for None
    weight: Array  # [O, C/G, K]

    @property
    def pixels(self) -> int:
        """Number of output pixels of all images."""
        return len(self.input) * self.geometry.pixels

    @property
    def sizes(self) -> tuple[int, ...]:
        """Geometry in the form that the compiled loops need."""
        g = self.geometry
        return (g.H, g.W, g.ow, g.kh, g.kw, g.sh, g.sw, g.dh, g.dw, g.pad_top, g.pad_left, g.C // g.D)


def _sample_scratch(chunk: _Chunk) -> tuple[Array, Array]:
    """Return scratch memory for the sampling points of a strip; see `loops._locate_samples`."""
    taps = chunk.geometry.K * vectors.STRIP
    return aligned_empty((8 * taps,), np.dtype(np.int32)), aligned_empty((11 * taps,), chunk.dtype)


def _channels_last(chunk: _Chunk, block: _Block) -> tuple[Array, tuple[Any, ...]]:
    """Return a copy [n, H*W + 1, width] of a block, and the job that fills it except for a zero pixel at each end."""
    count, extent = len(chunk.input), chunk.geometry.H * chunk.geometry.W
    source = loop_array(chunk.input[:, block.c0 : block.c0 + block.width], chunk.dtype, count, block.width, extent)
    image = aligned_empty((count, extent + 1, block.width), chunk.dtype)
    image[:, extent] = 0
    return image, to_channels_last(source, image)


def _images_per_chunk(geometry: DeformConvGeometry) -> int:
    return max(1, _CHUNK_PIXELS // max(geometry.pixels, geometry.H * geometry.W))


def _chunks(
    geometry: DeformConvGeometry, input: Array, offset: Array, weight: Array, mask: Array | None
) -> Iterator[tuple[slice, _Chunk]]:
    """Split the call into chunks: single images, or several if they are small."""
    g = geometry
    dtype = compute_dtype(input)
    loop_weight = loop_array(weight, dtype, g.O, g.C // g.G, g.K)
    together = _images_per_chunk(g)
    for n in range(0, g.N, together):
        images = slice(n, min(n + together, g.N))
        count = images.stop - n
        yield (
            images,
            _Chunk(
                geometry,
                dtype,
                input[images],
                loop_array(offset[images], dtype, count, 2 * g.D * g.K, g.pixels),
                _NO_MASK[dtype.name] if mask is None else loop_array(mask[images], dtype, count, g.D * g.K, g.pixels),
                loop_weight,
            ),
        )


@quiet
def deform_conv2d(
    geometry: DeformConvGeometry,
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
    precision: str | None,
) -> Array:
    """Compute a deformable convolution. See `dcnops.deform_conv2d`; the precision is always "ieee"."""
    g = geometry
    out = np.empty(g.output_shape, input.dtype)
    with serial_if_small(_multiply_adds(g)):
        for images, chunk in _chunks(geometry, input, offset, weight, mask):
            chunk_bias = np.zeros(g.O, chunk.dtype) if bias is None else loop_array(bias, chunk.dtype, g.O)
            target = StagedResult(out[images], chunk.dtype)
            for block in _blocks(geometry, _forward_channels(g, chunk.dtype.itemsize)):
                _add_block_output(chunk, block, chunk_bias, target.array)
            target.store()
    return out


def _forward_channels(geometry: DeformConvGeometry, itemsize: int) -> int:
    """Return the maximum number of channels in a block of the forward pass.

    Sampling points are located again for each block. All the same, blocks of large chunks contain at most half of the
    channels if that is enough to vectorise, so that the copies stay small compared to the images.
    """
    g = geometry
    copy_bytes = min(g.N, _images_per_chunk(g)) * g.C * g.H * g.W * itemsize
    if copy_bytes < _SMALL_COPY_BYTES and g.C * g.K * itemsize <= _SMALL_COLUMN_BYTES:
        return g.C
    return max(_LEAST_BLOCK_CHANNELS, min(_BLOCK_CHANNELS, g.C // 2))


def _multiply_adds(geometry: DeformConvGeometry) -> int:
    g = geometry
    return g.N * g.pixels * g.O * g.K * g.C // g.G


def _add_block_output(chunk: _Chunk, block: _Block, bias: Array, out: Array) -> None:
    """Write the output of the first block of a weight group, or add that of a later block."""
    dtype = chunk.dtype
    lanes = vectors.panel_lanes(dtype.itemsize)
    og = chunk.geometry.O // chunk.geometry.G
    panels = -(-og // lanes)
    length = chunk.geometry.K * block.cw
    image, copying = _channels_last(chunk, block)
    packed = aligned_empty((block.Gb, panels, length, lanes), dtype)
    parallel_jobs(pack_weight(chunk.weight, packed, block.g0, block.group_c0, block.cw, og), copying)
    tile = _choose_tile(chunk.pixels, block.Gb * (length + panels * lanes) * dtype.itemsize)
    LOGGER.debug(
        "%d channels, %d pixels in tiles of %d, %d threads", block.width, chunk.pixels, tile, threads_of_call()
    )

    def scratch() -> tuple[Any, ...]:
        columns = aligned_empty((block.Gb, tile, length), dtype)
        return _sample_scratch(chunk), columns, aligned_empty((block.Gb, tile, panels * lanes), dtype)

    parallel(
        loops.output_tile, -(-chunk.pixels // tile),
        chunk.sizes, image, chunk.offset, chunk.mask, packed, bias, out,
        block.c0, block.cw, block.o0, og, block.group_c0 > 0, tile,
        scratch=scratch,
    )  # fmt: skip


@quiet
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
    """Compute the gradients in `needs`, by argument name. See `dcnops.deform_conv2d_backward`."""
    g = geometry
    og = g.O // g.G
    dtype = compute_dtype(input)
    lanes = vectors.panel_lanes(dtype.itemsize)
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
        rows = round_up(og, vectors.ROWS)
        grad_weights = [np.zeros((block.Gb, rows, round_up(g.K * block.cw, lanes)), dtype) for block in blocks]

    with serial_if_small(2 * _multiply_adds(g)):
        for images, chunk in _chunks(geometry, input, offset, weight, mask):
            gradient = loop_array(grad_out[images], dtype, len(chunk.input), g.O, g.pixels)
            if "bias" in needs:
                grad_bias += gradient.sum(axis=(0, 2))
            targets = {name: StagedResult(result[images], dtype) for name, result in results.items()}
            if targets or "weight" in needs:
                arrays = {name: target.array for name, target in targets.items()}
                _add_gradients(chunk, gradient, blocks, arrays, grad_weights)
            for target in targets.values():
                target.store()

    if "bias" in needs:
        results["bias"] = rounded(grad_bias, input.dtype)
    if "weight" in needs:
        grad_weight = np.empty((g.O, g.C // g.G, g.K), dtype)
        for block, accumulated in zip(blocks, grad_weights):
            for job in unpack_weight(accumulated, grad_weight, block.g0, block.group_c0, block.cw, og):
                parallel(*job)
        results["weight"] = rounded(grad_weight, input.dtype).reshape(weight.shape)
    return results


def _add_gradients(
    chunk: _Chunk, grad_out: Array, blocks: list[_Block], targets: dict[str, Array], grad_weights: list[Array | None]
) -> None:
    """Add the gradients of a chunk of images.

    Parameters
    ----------
    chunk : _Chunk
    grad_out : array [n, O, oh*ow]
    blocks : list of _Block
    targets : dict
        Arrays of the needed gradients: "input" is written, "offset" and "mask" are added to.
    grad_weights : list of array [Gb, og rounded up, K*cw rounded up] or None
        Accumulated weight gradient of each block.
    """
    g, dtype = chunk.geometry, chunk.dtype
    grad_rows = None
    if targets:
        grad_rows = aligned_empty((len(grad_out), g.pixels, g.O), dtype)
        parallel(*to_channels_last(grad_out, grad_rows))
        grad_rows = grad_rows.reshape(chunk.pixels, g.O)
    if targets.keys() & {"offset", "mask"}:
        targets.setdefault("offset", np.zeros_like(chunk.offset))
        targets.setdefault("mask", _NO_MASK[dtype.name])
    for block, grad_weight in zip(blocks, grad_weights):
        _add_block_gradients(chunk, block, grad_out, grad_rows, targets, grad_weight)


def _add_block_gradients(
    chunk: _Chunk,
    block: _Block,
    grad_out: Array,
    grad_rows: Array | None,
    targets: dict[str, Array],
    grad_weight: Array | None,
) -> None:
    """Add the gradients of one block, in spans of output pixels with columns that fit the cache."""
    g, dtype, sizes = chunk.geometry, chunk.dtype, chunk.sizes
    og = g.O // g.G
    lanes = vectors.panel_lanes(dtype.itemsize)
    panels = -(-g.K * block.cw // lanes)
    # An even number of panels would map the rows of a panel to few sets of the first-level cache.
    row_bytes = block.Gb * (panels | 1) * lanes * dtype.itemsize
    tile = _choose_tile(chunk.pixels, row_bytes)
    # Sums are added span by span, so its length must not depend on the number of threads, as that of a tile does.
    span = min(round_up(chunk.pixels, vectors.ROWS), max(1, _SPAN_BYTES // row_bytes // _TILE_PIXELS) * _TILE_PIXELS)
    LOGGER.debug(
        "%d channels, %d pixels in spans of %d and tiles of %d, %d threads",
        block.width, chunk.pixels, span, tile, threads_of_call(),
    )  # fmt: skip

    image = packed = grad_image = None
    none = _NO_MASK[dtype.name]
    gradients = columns = none
    grad_offset, grad_mask = targets.get("offset", none), targets.get("mask", none)
    samples_needed = grad_weight is not None or "offset" in targets
    jobs = []
    if samples_needed:
        image, copying = _channels_last(chunk, block)
        jobs.append(copying)
    if grad_weight is not None:
        columns = aligned_empty((block.Gb, span, (panels | 1) * lanes), dtype)
    if grad_rows is not None:
        gradients = aligned_empty((block.Gb, span, (panels | 1) * lanes), dtype)
        packed = aligned_empty((block.Gb, panels, og, lanes), dtype)
        packing, finish_packing = pack_weight_transposed(chunk.weight, packed, block.g0, block.group_c0, block.cw)
        jobs.append(packing)
    if "input" in targets:
        grad_image = aligned_empty((len(chunk.input), g.H * g.W + 1, block.width), dtype)
        jobs.append((lambda begin, end: grad_image[:, begin:end].fill(0), g.H * g.W + 1))
    parallel_jobs(*jobs)
    if grad_rows is not None:
        parallel(*finish_packing)

    def fill_tiles(first: int, last: int, samples: tuple[Array, Array], begin: int, end: int) -> None:
        if grad_rows is not None:
            loops.column_gradients(grad_rows, packed, gradients, block.o0, first, last, tile, begin, end)
        if samples_needed:
            loops.sampling_gradients(
                sizes, image, chunk.offset, chunk.mask, gradients, columns, grad_offset, grad_mask,
                block.c0, block.cw, first, samples, begin * tile, min(end * tile, last - first),
            )  # fmt: skip

    for first in range(0, chunk.pixels, span):
        last = min(first + span, chunk.pixels)
        parallel(fill_tiles, -(-(last - first) // tile), first, last, scratch=lambda: (_sample_scratch(chunk),))
        if grad_image is not None:
            parallel(
                loops.scatter_columns, block.width,
                sizes, chunk.offset, chunk.mask, gradients, grad_image, block.c0, block.cw, first, last,
                scratch=lambda: (_sample_scratch(chunk),), pieces_per_thread=1, least=CHANNELS_PER_THREAD,
            )  # fmt: skip
        if grad_weight is not None:
            parallel(
                loops.weight_gradient, block.Gb * panels,
                grad_out, columns, grad_weight, panels, block.o0, og, first, last,
            )  # fmt: skip
    if grad_image is not None:
        parallel(*from_channels_last(grad_image, targets["input"], block.c0))
