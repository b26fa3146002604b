"""Deformable convolution on NumPy arrays.

Images are processed in blocks of channels: a block is copied to channels-last, and threads then take small tiles of
output pixels from sampling to the finished matrix product, so that the sampled columns never leave the cache. Threads
are the library's own: compiled loops without the GIL in a thread pool. That is safe to call from any number of
threads and after a fork, leaves no busy-waiting threads behind for the caller's next operation, and no result depends
on the number of threads.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from dcnops._backends import _cpu_loops as loops
from dcnops._geometry import DeformConvGeometry

__all__ = ["deform_conv2d", "deform_conv2d_backward"]

Array = npt.NDArray[Any]

_THREADS: int = numba.config.NUMBA_NUM_THREADS
_PIECES_PER_THREAD = 4

# Tuned at 2 MB of L2 per core; half and twice of each change little.
_BLOCK_CHANNELS = (32, 128)
_TILE_PIXELS = 16 * loops.ROWS
_TILE_BYTES = 2**19
_SPAN_BYTES = 2**22
_CHUNK_PIXELS = 2048


class _Pool:
    """Threads that help the calling one; started on first use, and again in a forked child, which inherits none."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None], helpers: int) -> None:
        """Call `work` in this thread and, as far as threads are free, in `helpers` others; return when all are done."""
        futures = []
        if helpers:
            with self._lock:
                if self._executor is None:
                    self._executor = ThreadPoolExecutor(_THREADS - 1, thread_name_prefix="dcnops")
            try:
                futures = [self._executor.submit(work) for _ in range(helpers)]
            except RuntimeError:
                # The interpreter is shutting down and starts no more threads: this one does it all.
                futures = []
        work()
        for future in futures:
            if not future.cancel():
                future.result()


_POOL = _Pool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOL.forget)


def _parallel(
    kernel: Callable[..., None],
    items: int,
    *args: Any,
    scratch: Callable[[], tuple[Array, ...]] = tuple,
    pieces_per_thread: int = _PIECES_PER_THREAD,
    least: int = 1,
) -> None:
    """Call ``kernel(*args, *scratch(), begin, end)`` for pieces of the items, at least `least` each, on all threads."""
    size = max(least, -(-items // (_THREADS * pieces_per_thread)))
    starts = iter(range(0, items, size))
    lock = threading.Lock()

    def work() -> None:
        buffers: tuple[Array, ...] | None = None
        while True:
            with lock:
                begin = next(starts, None)
            if begin is None:
                return
            if buffers is None:
                buffers = scratch()
            kernel(*args, *buffers, begin, min(begin + size, items))

    _POOL.run(work, min(_THREADS, -(-items // size)) - 1)


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


def _blocks(geometry: DeformConvGeometry) -> Iterator[_Block]:
    channels = geometry.C // geometry.G
    og = geometry.O // geometry.G
    least, most = _BLOCK_CHANNELS
    # Half the channels at most, where that is enough to vectorise: the copies stay small beside the image itself.
    limit = max(least, min(most, geometry.C // 2))
    if channels > limit:
        parts = -(-channels // limit)
        cw = -(-channels // parts)
        for g in range(geometry.G):
            for c in range(0, channels, cw):
                width = min(cw, channels - c)
                yield _Block(g * channels + c, width, g, 1, c, width, g * og)
    else:
        groups = limit // channels
        for g in range(0, geometry.G, groups):
            Gb = min(groups, geometry.G - g)
            yield _Block(g * channels, Gb * channels, g, Gb, 0, channels, g * og)


def _chunks(geometry: DeformConvGeometry) -> Iterator[slice]:
    """Images that are processed together: several of them if they are tiny."""
    images = max(1, _CHUNK_PIXELS // max(geometry.pixels, geometry.H * geometry.W))
    for n in range(0, geometry.N, images):
        yield slice(n, min(n + images, geometry.N))


def _sizes(geometry: DeformConvGeometry) -> tuple[int, ...]:
    g = geometry
    return (g.H, g.W, g.ow, g.kh, g.kw, g.sh, g.sw, g.dh, g.dw, g.pad_top, g.pad_left, g.C // g.D)


def _real(array: Array) -> np.dtype[Any]:
    """The dtype to compute in."""
    return np.dtype(np.float64 if array.dtype == np.float64 else np.float32)


def _plain(array: Array, dtype: np.dtype[Any], *shape: int) -> Array:
    """The array as the compiled loops take it; a copy only where it is something else."""
    return np.require(array, dtype, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE", "ENSUREARRAY"]).reshape(shape)


class _Staged:
    """Part of a result, in the dtype of computation: `array` is the part itself, or is rounded into it by `store`."""

    def __init__(self, result: Array, images: slice, dtype: np.dtype[Any]) -> None:
        self._part = result[images]
        count, channels, *extents = self._part.shape
        same = self._part.dtype == dtype
        self.array = (self._part if same else self._part.astype(dtype)).reshape(count, channels, math.prod(extents))
        self._copied = not same

    def store(self) -> None:
        if self._copied:
            with np.errstate(over="ignore", invalid="ignore"):
                self._part[...] = self.array.reshape(self._part.shape)


def _strips(count: int, values: int) -> int:
    return count * -(-values // 32)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _channels_last(geometry: DeformConvGeometry, part: Array, block: _Block, dtype: np.dtype[Any]) -> Array:
    """Channels-last copy of a block of some images, [n, H*W + 1, width], with a zero pixel at the end of each."""
    extent = geometry.H * geometry.W
    count = part.shape[0]
    source = _plain(part[:, block.c0 : block.c0 + block.width], dtype, count, block.width, extent)
    image = np.empty((count, extent + 1, block.width), dtype)
    image[:, extent] = 0
    _parallel(loops.to_channels_last, _strips(count, extent), source, image)
    return image


def _tile(pixels: int, bytes_per_pixel: int) -> int:
    """Pixels of a tile: fits the cache, leaves work for every thread, and is a multiple of ROWS."""
    share = -(-pixels // (_THREADS * _PIECES_PER_THREAD))
    return _round_up(max(1, min(_TILE_PIXELS, _TILE_BYTES // bytes_per_pixel // loops.ROWS * loops.ROWS, share)), loops.ROWS)


def _add_outputs(
    geometry: DeformConvGeometry,
    block: _Block,
    input: Array,
    offset: Array,
    mask: Array,
    weight: Array,
    bias: Array,
    out: Array,
) -> None:
    """Write, or add to what earlier blocks of the same weight group wrote, the products of one block of channels."""
    dtype = out.dtype
    lanes = loops.panel_lanes(dtype.itemsize)
    og = geometry.O // geometry.G
    panels = -(-og // lanes)
    length = geometry.K * block.cw
    total = out.shape[0] * out.shape[2]
    image = _channels_last(geometry, input, block, dtype)
    packed = np.empty((block.Gb, panels, length, lanes), dtype)
    _parallel(loops.pack_weight, block.Gb * panels, weight, packed, block.g0, block.group_c0, block.cw, og)
    tile = _tile(total, block.Gb * (length + panels * lanes) * dtype.itemsize)

    def scratch() -> tuple[Array, ...]:
        return np.empty((block.Gb, tile, length), dtype), np.empty((block.Gb, tile, panels * lanes), dtype)

    _parallel(
        loops.output_tile, -(-total // tile),
        _sizes(geometry), image, offset, mask, packed, bias, out,
        block.c0, block.cw, block.o0, og, block.group_c0 > 0, tile,
        scratch=scratch,
    )  # fmt: skip


def deform_conv2d(
    geometry: DeformConvGeometry,
    input: Array,
    offset: Array,
    weight: Array,
    bias: Array | None,
    mask: Array | None,
) -> Array:
    """Deformable convolution; the arguments are those of `dcnops.deform_conv2d`, checked."""
    N, C, O, G, D, K, pixels = (
        geometry.N, geometry.C, geometry.O, geometry.G, geometry.D, geometry.K, geometry.pixels
    )  # fmt: skip
    real = _real(input)
    out = np.empty(geometry.output_shape, input.dtype)
    weight = _plain(weight, real, O, C // G, K)
    bias = np.zeros(O, real) if bias is None else _plain(bias, real, O)

    for images in _chunks(geometry):
        count = images.stop - images.start
        target = _Staged(out, images, real)
        offset_part = _plain(offset[images], real, count, 2 * D * K, pixels)
        mask_part = np.empty((0, 0, 0), real) if mask is None else _plain(mask[images], real, count, D * K, pixels)
        for block in _blocks(geometry):
            _add_outputs(geometry, block, input[images], offset_part, mask_part, weight, bias, target.array)
        target.store()
    return out


def deform_conv2d_backward(
    geometry: DeformConvGeometry,
    grad_out: Array,
    input: Array,
    offset: Array,
    weight: Array,
    mask: Array | None,
    needs: frozenset[str],
) -> dict[str, Array]:
    """Gradients of `deform_conv2d` by the name of the argument, those in `needs`."""
    N, C, O, G, D, K, pixels = (
        geometry.N, geometry.C, geometry.O, geometry.G, geometry.D, geometry.K, geometry.pixels
    )  # fmt: skip
    og = O // G
    real = _real(input)
    lanes = loops.panel_lanes(real.itemsize)
    sizes = _sizes(geometry)
    needs_sampling = bool(needs & {"offset", "mask"})
    needs_columns = needs_sampling or "input" in needs
    blocks = list(_blocks(geometry))

    grad_input = np.empty(input.shape if "input" in needs else (N, 0, 0), input.dtype)
    grad_offset = np.zeros(offset.shape if needs_sampling else (N, 0, 0), offset.dtype)
    grad_mask = np.zeros(mask.shape if mask is not None and "mask" in needs else (N, 0, 0), offset.dtype)
    grad_bias = np.zeros(O, real)
    grad_weights = [
        np.zeros((block.Gb, _round_up(og, loops.ROWS), _round_up(K * block.cw, lanes)), real) if "weight" in needs else None
        for block in blocks
    ]
    plain_weight = _plain(weight, real, O, C // G, K)

    for images in _chunks(geometry):
        count = images.stop - images.start
        total = count * pixels
        grad_part = _plain(grad_out[images], real, count, O, pixels)
        if "bias" in needs:
            grad_bias += grad_part.sum(axis=(0, 2))
        if needs <= {"bias"}:
            continue
        grad_last = np.empty((count, pixels, O), real)
        _parallel(loops.to_channels_last, _strips(count, pixels), grad_part, grad_last)
        offset_part = _plain(offset[images], real, count, 2 * D * K, pixels)
        mask_part = np.empty((0, 0, 0), real) if mask is None else _plain(mask[images], real, count, D * K, pixels)
        input_target = _Staged(grad_input, images, real)
        offset_target = _Staged(grad_offset, images, real)
        mask_target = _Staged(grad_mask, images, real)

        for block, grad_weight in zip(blocks, grad_weights):
            padded = _round_up(K * block.cw, lanes)
            panels = padded // lanes
            row_bytes = block.Gb * padded * real.itemsize
            tile = _tile(total, row_bytes)
            span = min(_round_up(total, tile), max(1, _SPAN_BYTES // row_bytes // tile) * tile)
            buffer = (block.Gb, span, padded)
            if needs_sampling or "weight" in needs:
                image = _channels_last(geometry, input[images], block, real)
            if needs_columns:
                packed = np.empty((block.Gb, panels, og, lanes), real)
                _parallel(
                    loops.pack_weight_transposed, block.Gb * og, plain_weight, packed, block.g0, block.group_c0, block.cw
                )
                gradients = np.empty(buffer, real)
            if "weight" in needs:
                columns = np.empty(buffer, real)
            if "input" in needs:
                grad_image = np.zeros((count, geometry.H * geometry.W + 1, block.width), real)

            for first in range(0, total, span):
                last = min(first + span, total)
                if needs_columns:
                    _parallel(
                        loops.column_gradients, -(-(last - first) // tile),
                        grad_last.reshape(total, O), packed, gradients, block.o0, first, last, tile,
                    )  # fmt: skip
                if needs_sampling:
                    _parallel(
                        loops.sampling_gradients, last - first,
                        sizes, image, offset_part, mask_part, gradients, offset_target.array, mask_target.array,
                        block.c0, block.cw, first,
                    )  # fmt: skip
                if "input" in needs:
                    _parallel(
                        loops.scatter_columns, block.width,
                        sizes, offset_part, mask_part, gradients, grad_image, block.c0, block.cw, first, last,
                        pieces_per_thread=1, least=16,
                    )  # fmt: skip
                if grad_weight is not None:
                    _parallel(
                        loops.sample_columns, last - first,
                        sizes, image, offset_part, mask_part, columns, block.c0, block.cw, first,
                    )  # fmt: skip
                    _parallel(
                        loops.weight_gradient, block.Gb * panels,
                        grad_part, columns, grad_weight, block.o0, og, first, last,
                        scratch=lambda: (np.empty((loops.WEIGHT_GRADIENT_DEPTH, lanes), real),),
                    )  # fmt: skip
            if "input" in needs:
                strips = _strips(count, geometry.H * geometry.W)
                _parallel(loops.from_channels_last, strips, grad_image, input_target.array, block.c0)
        for target in (input_target, offset_target, mask_target):
            target.store()

    results: dict[str, Array] = {}
    if "input" in needs:
        results["input"] = grad_input
    if "offset" in needs:
        results["offset"] = grad_offset
    if "mask" in needs:
        results["mask"] = grad_mask
    if "bias" in needs:
        with np.errstate(over="ignore", invalid="ignore"):
            results["bias"] = grad_bias.astype(input.dtype, copy=False)
    if "weight" in needs:
        full = np.empty((O, C // G, K), real)
        for block, grad_weight in zip(blocks, grad_weights):
            _parallel(
                loops.unpack_weight, block.Gb * og, grad_weight, full, block.g0, block.group_c0, block.cw, og
            )
        with np.errstate(over="ignore", invalid="ignore"):
            results["weight"] = full.reshape(weight.shape).astype(input.dtype, copy=False)
    return results
