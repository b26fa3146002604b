"""The gradients of deformable convolution: groups of images, in chunks of columns [rows, G, K, C/G].

A chunk's columns exist once: first as their gradient, from which the input's gradient is gathered; then the kernel that
makes the gradients of offsets and masks puts the columns in its place, for the weights' gradient.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dcnops._backends.cuda.constants import (
    ARRAY_JOBS_SHARED_BYTES,
    BAND_ROWS,
    LIST_PART_BYTES,
    LISTS_PER_THREAD,
    MAX_ROWS,
    THREADS,
    VECTOR_BYTES,
    WARP,
    WORKSPACE_BYTES,
    ceil_div,
)
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.array_jobs import (
    ArrayJob,
    ArrayJobsParams,
    RowRange,
    are_rows,
    array_job_tiles,
    array_jobs_params,
    channel_sums_jobs,
    empty_images,
    is_channels_last,
    pixels_to_rows_job,
    row_ranges,
    rows_to_pixels_job,
    run_array_jobs,
    sum_dtype,
)
from dcnops._backends.cuda.plans.deform_conv2d_common import (
    SampleKernels,
    column_sample_bytes,
    filters_job,
    sizes_of,
)
from dcnops._backends.cuda.plans.deform_conv2d_forward import DeformConvColumnsParams
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformConvGeometry, DeformConvSizes

_UNIT = "deform_conv2d_backward"

_LISTED_CHANNELS = 32
"""From so many channels per deformable group on, the input's gradient is gathered by lists.

With fewer, an entry of a list weighs about as much as the channels that it stands for.
"""

_MOST_ENTRIES = 2**30
_COUNT_BLOCKS = 4
"""Blocks per multiprocessor that count the entries of lists, at most."""

_ALIGNED_ROWS = 64

_pointer = ctypes.c_void_p
_int = ctypes.c_int


@dataclass(frozen=True)
class ListLimits:
    """Where a list is too long for one warp. Any limits give right results."""

    part_entries: int = 1024
    """Entries that one warp sums; further parts of a list go to other warps, and all of these add atomically."""

    sorted_entries: int = 256
    """The longest list that the deterministic mode sorts, at most 65535; longer ones are summed by a search."""


class Divisor(ctypes.Structure):
    """Divides numbers below 2**31 by a product and a shift (`Divisor` in dcn/rows.cuh)."""

    _fields_ = [("value", ctypes.c_uint), ("magic", ctypes.c_uint), ("shift", ctypes.c_uint)]


def divisor(value: int) -> Divisor:
    assert 1 <= value < 2**31
    shift = (value - 1).bit_length()
    return Divisor(value, 2**32 * (2**shift - value) // value + 1, shift)


class DeformConvBackwardParams(ctypes.Structure):
    """What the kernels of deform_conv2d_backward.cu take."""

    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("columns", _pointer),
        ("grad_offset", _pointer),
        ("grad_mask", _pointer),
        ("grad_input", _pointer),
        ("lengths", _pointer),
        ("starts", _pointer),
        ("entries", _pointer),
        ("parts", _pointer),
        ("counters", _pointer),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("by_taps", Divisor),
        ("by_group_taps", Divisor),
        ("by_kernel_width", Divisor),
        ("by_pixels", Divisor),
        ("by_output_width", Divisor),
        ("by_rows", Divisor),
        ("by_groups", Divisor),
        ("by_group_channels", Divisor),
        ("lists", ctypes.c_longlong),
        ("part_entries", _int),
        ("sorted_entries", _int),
        ("warp_bytes", _int),
        ("tile_samples", _int),
        ("tiles", ctypes.c_uint),
        ("channels", _int),
        ("write_columns", _int),
        ("count_blocks", _int),
        ("array_jobs", ArrayJobsParams),
    ]


def gradient_sample_bytes(dtype: str) -> int:
    """Shared memory per sampling point, in bytes; the kernels assert that it is enough."""
    return 112 if dtype == "float64" else 64


def deform_conv2d_backward(
    engine: Engine,
    geometry: DeformConvGeometry,
    grad_out: Any,
    input: Any,
    offset: Any,
    weight: Any,
    mask: Any | None,
    needs: frozenset[str],
    deterministic: bool = False,
    precision: str = "ieee",
    chunk_bytes: int = WORKSPACE_BYTES,
    limits: ListLimits = ListLimits(),
) -> dict[str, Any]:
    """The gradients named in `needs`, each in the dtype and memory order of its argument.

    Parameters
    ----------
    grad_out, input, offset, weight, mask : array
        Contiguous or channels-last.
    deterministic : bool
        Sum the input's gradient in an order that is always the same.
    precision : {"ieee", "tf32", "3xtf32"}
        Of the matrix products of float32 data.
    chunk_bytes : int
        What scratch memory is to keep within, that of the weights not counted.
    limits : ListLimits
        Of the lists that the input's gradient is gathered by.

    Notes
    -----
    Scratch memory is made of what follows, each where it is needed, with s bytes per element of the data and S per sum
    (4, or 8 for float64):

    - F, once: the weights as rows (``O*C/G*K*s``) unless they are channels-last; the sums of their gradient
      (``O*C/G*K*S``) unless it is channels-last and of the dtype of sums; partial sums of the bias (``O*S`` for each
      image, or for each 1024 rows of a channels-last `grad_out`); 256 bytes.
    - I, for each image of a group: the input as rows (``H*W*C*s``) unless it is channels-last; the sums of its gradient
      (``H*W*C*S``) unless it is channels-last and of the dtype of sums; starts and lengths of lists (``8*H*W*D``);
      `grad_out` as rows (``oh*ow*O*s``) unless it is channels-last, or the group has one image and ``oh*ow*s`` is a
      multiple of 16.
    - R, for each row of a chunk: columns (``K*C*s``); entries of lists (``8*D*K*S``) and parts of long lists
      (``D*K/16``).

    With ``B = chunk_bytes``, a group has as many images as fit in B with all their rows, at least one. Of a single
    image, a chunk has as many rows as fit in ``max(B - I, B / 2)``, at least one. In all that is at most
    ``F + max(B, I + max(B / 2, R))``: within `chunk_bytes`, unless a single image is large, beside what weights need.
    """
    call = _Call(
        engine, geometry, grad_out, input, offset, weight, mask, needs, deterministic, precision, chunk_bytes, limits
    )
    return call.run()


class _Call:
    """One call: which steps it takes, its gradients, the scratch memory that its pieces take turns in."""

    def __init__(
        self,
        engine: Engine,
        geometry: DeformConvGeometry,
        grad_out: Any,
        input: Any,
        offset: Any,
        weight: Any,
        mask: Any | None,
        needs: frozenset[str],
        deterministic: bool,
        precision: str,
        chunk_bytes: int,
        limits: ListLimits,
    ) -> None:
        g = geometry
        self.engine, self.geometry, self.precision = engine, geometry, precision
        self.grad_out, self.input, self.offset, self.weight, self.mask = grad_out, input, offset, weight, mask
        self.dtype, self.sums = str(input.dtype.name), sum_dtype(engine, input.dtype)
        itemsize, sum_size = DTYPES[self.dtype].itemsize, self.sums.itemsize
        self.taps = RowRange(0, 0, g.O * g.K)

        self.samples = bool(needs & {"offset", "mask"})
        self.makes_columns = "weight" in needs
        self.propagates = self.samples or "input" in needs
        gathers = "input" in needs and (deterministic or g.C // g.D >= _LISTED_CHANNELS)
        self.scatters = "input" in needs and not gathers
        self.reads_input = self.samples or self.makes_columns
        copies_input = self.reads_input and not are_rows(engine, input)
        copies_weight = self.propagates and not are_rows(engine, weight)
        # Otherwise the gradient is summed where it is.
        sums_input = "input" in needs and not (is_channels_last(input) and input.dtype == self.sums)
        sums_weight = "weight" in needs and not (is_channels_last(weight) and weight.dtype == self.sums)

        self.gradients = {
            name: empty_images(engine, array.shape, array.dtype, array)
            for name, array in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask))
            if name in needs and array is not None
        }
        self.opening: list[ArrayJob] = []
        """Changes of layout that share a launch with the first group's."""
        self.closing: list[ArrayJob] = []
        """... with the last group's."""
        if "bias" in needs:
            self.gradients["bias"] = engine.empty((g.O,), grad_out.dtype)
            sum_parts, sum_up, self._bias_parts = channel_sums_jobs(
                engine, grad_out, g.N, g.O, g.pixels, self.gradients["bias"]
            )
            self.opening.append(sum_parts)
            self.closing.append(sum_up)
        if not self.propagates and not self.makes_columns:
            return

        image_bytes = g.H * g.W * g.C * (copies_input * itemsize + sums_input * sum_size)
        row_bytes = g.K * g.C * itemsize
        if gathers:
            list_bytes, entry_bytes = _Lists.bytes(g, sum_size, limits)
            image_bytes += list_bytes
            row_bytes += entry_bytes
        # cuBLAS takes part of an image [O, oh*ow] for rows, but is slow where [oh*ow] is not aligned.
        grad_out_bytes = 0 if is_channels_last(grad_out) else g.O * g.pixels * itemsize
        is_aligned = g.pixels * itemsize % VECTOR_BYTES == 0
        self.images, self.rows = _cut(
            g,
            chunk_bytes,
            image_bytes + (0 if is_aligned else grad_out_bytes),
            image_bytes + grad_out_bytes,
            row_bytes,
        )
        copies_grad_out = grad_out_bytes > 0 and (self.images > 1 or not is_aligned)

        pixels, dtype, filters = self.images * g.H * g.W, input.dtype, (g.G, g.O // g.G, g.K * g.C // g.G)
        self.input_rows = engine.empty((pixels, g.C), dtype) if copies_input else None
        self.grad_input_rows = engine.empty((pixels, g.C), self.sums) if sums_input else None
        self.grad_out_rows = engine.empty((self.images * g.pixels, g.O), dtype) if copies_grad_out else None
        self.columns = engine.empty((self.rows, g.G, filters[2]), dtype)
        self.lists = _Lists(engine, g, self.images, self.rows, deterministic, limits, self.sums) if gathers else None
        if copies_weight:
            self.filters = engine.empty(filters, dtype)
            self.opening.append(filters_job(engine, g, weight, self.filters))
        elif self.propagates:
            self.filters = _rows(weight, g.C // g.G).reshape(filters)
        if sums_weight:
            self.grad_filters = engine.zeros(filters, self.sums)
            self.closing.append(
                rows_to_pixels_job(engine, self.grad_filters, self.gradients["weight"], g.C // g.G, g.K, self.taps)
            )
        elif self.makes_columns:
            self.grad_filters = _rows(self.gradients["weight"], g.C // g.G).reshape(filters)
            self.grad_filters.fill(0)

        offset_dtype = str(offset.dtype.name)
        self.column_kernels = engine.recall(
            SampleKernels, "deform_conv2d_columns", g, self.dtype, offset_dtype, column_sample_bytes(self.dtype)
        )
        self.gradient_kernels = engine.recall(
            SampleKernels, _UNIT, g, self.dtype, offset_dtype, gradient_sample_bytes(self.dtype)
        )
        self.params = DeformConvBackwardParams(
            columns=engine.pointer(self.columns),
            size=sizes_of(g, offset, mask),
            by_taps=divisor(g.K),
            by_group_taps=divisor(g.D * g.K),
            by_kernel_width=divisor(g.kw),
            by_pixels=divisor(g.pixels),
            by_output_width=divisor(g.ow),
            by_groups=divisor(g.D),
            by_group_channels=divisor(g.C // g.G),
            tile_samples=self.gradient_kernels.tile_rows,
            channels=g.C // g.D,
            write_columns=self.makes_columns,
        )
        """What the kernels take; groups and chunks fill in their part."""

    def run(self) -> dict[str, Any]:
        g = self.geometry
        if g.N == 0 or not (self.propagates or self.makes_columns):
            run_array_jobs(self.engine, self.dtype, self.opening)
            run_array_jobs(self.engine, self.dtype, self.closing)
            return self.gradients
        with self.engine.products() as self.multiply:
            for first in range(0, g.N, self.images):
                self._run_group(slice(first, min(first + self.images, g.N)))
        return self.gradients

    def _run_group(self, images: slice) -> None:
        engine, g = self.engine, replace(self.geometry, N=images.stop - images.start)
        input, offset, grad_out = self.input[images], self.offset[images], self.grad_out[images]
        mask = None if self.mask is None else self.mask[images]
        gradients = {
            name: array[images] for name, array in self.gradients.items() if name in ("input", "offset", "mask")
        }
        all_rows, all_pixels = RowRange(0, 0, g.N * g.pixels), RowRange(0, 0, g.N * g.H * g.W)

        jobs = self.opening if images.start == 0 else []
        closing = self.closing if images.stop == self.geometry.N else []
        if self.input_rows is not None:
            jobs = [*jobs, pixels_to_rows_job(engine, input, g.C, g.H * g.W, all_pixels, self.input_rows)]
        if self.grad_out_rows is not None:
            jobs = [*jobs, pixels_to_rows_job(engine, grad_out, g.O, g.pixels, all_rows, self.grad_out_rows)]
        grad_input = self.grad_input_rows
        if grad_input is not None:
            closing = [rows_to_pixels_job(engine, grad_input, gradients["input"], g.C, g.H * g.W, all_pixels), *closing]
        elif "input" in gradients:
            grad_input = _rows(gradients["input"], g.C)
        if grad_input is not None:
            grad_input.fill(0)

        params = self.params
        params.size.N = g.N
        params.input = engine.pointer(input if self.input_rows is None else self.input_rows)
        params.offset, params.mask = engine.pointer(offset), engine.pointer(mask)
        params.grad_offset = engine.pointer(gradients.get("offset"))
        params.grad_mask = engine.pointer(gradients.get("mask"))
        params.grad_input = engine.pointer(grad_input)
        for rows in row_ranges(g.N, g.pixels, self.rows):
            params.range, params.by_rows = rows, divisor(rows.rows)
            samples = ceil_div(rows.rows, BAND_ROWS) * BAND_ROWS * g.K
            params.tiles = g.D * ceil_div(samples, params.tile_samples)
            if self.lists is not None:
                self.lists.make(self.gradient_kernels, params, g, jobs)
            else:
                run_array_jobs(engine, self.dtype, jobs)
            jobs = []
            self._run_chunk(g, params, self._grad_out_of(grad_out, rows))
        run_array_jobs(engine, self.dtype, closing)

    def _grad_out_of(self, grad_out: Any, rows: RowRange) -> Any:
        """What of the output's gradient belongs to `rows`, as factors [G, rows, O/G]."""
        g = self.geometry
        first = rows.first_image * g.pixels + rows.first_pixel
        if self.grad_out_rows is None and not is_channels_last(grad_out):
            image = grad_out.reshape(g.G, g.O // g.G, g.pixels)
            return image[:, :, first : first + rows.rows].transpose(0, 2, 1)
        together = _rows(grad_out, g.O) if self.grad_out_rows is None else self.grad_out_rows
        return together[first : first + rows.rows].reshape(rows.rows, g.G, g.O // g.G).transpose(1, 0, 2)

    def _run_chunk(self, geometry: DeformConvGeometry, params: DeformConvBackwardParams, grad_out: Any) -> None:
        rows = params.range
        columns = self.columns[: rows.rows].transpose(1, 0, 2)
        if self.propagates:
            self.multiply(grad_out, self.filters, columns, False, self.precision)
        if self.lists is not None:
            self.lists.gather(self.gradient_kernels, params)
        elif self.scatters:
            self.gradient_kernels.launch("deform_conv2d_scatter_input", params, rows.rows)
        if self.samples:
            self.gradient_kernels.launch("deform_conv2d_grad_samples", params, rows.rows)
        elif self.makes_columns:
            arguments = params.input, params.offset, params.mask, params.columns, params.size, rows
            forward = DeformConvColumnsParams(*arguments, self.column_kernels.tile_rows)
            self.column_kernels.launch("deform_conv2d_columns", forward, rows.rows)
        if self.makes_columns:
            self.multiply(grad_out.transpose(0, 2, 1), columns, self.grad_filters, True, self.precision)


class _Lists:
    """The lists that the input's gradient is gathered by, one for each (pixel of the input, deformable group)."""

    def __init__(
        self,
        engine: Engine,
        geometry: DeformConvGeometry,
        images: int,
        rows: int,
        deterministic: bool,
        limits: ListLimits,
        sums: Any,
    ) -> None:
        g = geometry
        self._engine, self._deterministic, self._limits = engine, deterministic, limits
        self._entry_bytes = 2 * sums.itemsize
        lists = _padded(images * g.H * g.W * g.D)
        entries = 4 * rows * g.D * g.K
        assert entries <= _MOST_ENTRIES
        self._lengths = engine.zeros((lists,), engine.xp.int32)
        self._starts = engine.empty((lists,), engine.xp.int32)
        self._entries = engine.empty((entries, self._entry_bytes), engine.xp.uint8)
        self._parts = engine.empty((entries // limits.part_entries, LIST_PART_BYTES), engine.xp.uint8)
        self._counters = engine.zeros((2,), engine.xp.int32)

    @staticmethod
    def bytes(geometry: DeformConvGeometry, sum_size: int, limits: ListLimits) -> tuple[int, int]:
        """What an image's lists take, and what a row's entries do."""
        g = geometry
        entries = 4 * g.D * g.K
        return 8 * g.H * g.W * g.D, entries * 2 * sum_size + ceil_div(entries * LIST_PART_BYTES, limits.part_entries)

    def make(
        self,
        kernels: SampleKernels,
        params: DeformConvBackwardParams,
        geometry: DeformConvGeometry,
        jobs: Sequence[ArrayJob],
    ) -> None:
        """Make the lists of the rows of `params`; changes of layout share the launch that begins it."""
        g = geometry
        params.lengths, params.starts = self._engine.pointer(self._lengths), self._engine.pointer(self._starts)
        params.entries, params.parts = self._engine.pointer(self._entries), self._engine.pointer(self._parts)
        params.counters = self._engine.pointer(self._counters)
        params.lists = g.N * g.H * g.W * g.D
        params.part_entries = self._limits.part_entries
        params.sorted_entries = self._limits.sorted_entries
        params.array_jobs = array_jobs_params(jobs)
        counts = ceil_div(params.range.rows * g.D * g.K, THREADS)
        params.count_blocks = min(counts, _COUNT_BLOCKS * self._engine.device.multiprocessors)
        blocks = params.count_blocks + array_job_tiles(jobs)
        kernels.launch_blocks("deform_conv2d_prepare", blocks, (THREADS, 1), params, ARRAY_JOBS_SHARED_BYTES)
        kernels.launch_blocks("deform_conv2d_fill_lists", counts, (THREADS, 1), params)

    def gather(self, kernels: SampleKernels, params: DeformConvBackwardParams) -> None:
        """Add the columns on the lists to the input's gradient."""
        blocks = ceil_div(params.lists, THREADS // WARP)
        if not self._deterministic:
            kernels.launch_blocks("deform_conv2d_gather_input", blocks, kernels.block, params)
            return
        columns = 4 * ceil_div(params.sorted_entries, 4)
        params.warp_bytes = ceil_div(WARP * self._entry_bytes + 4 * columns + 2 * params.sorted_entries, 16) * 16
        shared_bytes = THREADS // WARP * params.warp_bytes
        kernels.launch_blocks("deform_conv2d_gather_input_in_order", blocks, kernels.block, params, shared_bytes)


def _padded(lists: int) -> int:
    """Lists and one more, in whole pieces of what a thread takes at a time."""
    return (lists // LISTS_PER_THREAD + 1) * LISTS_PER_THREAD


def _rows(images: Any, C: int) -> Any:
    """Channels-last images as rows, a view."""
    return images.transpose(0, 2, 3, 1).reshape(-1, C)


def _cut(
    geometry: DeformConvGeometry, budget: int, single_image_bytes: int, image_bytes: int, row_bytes: int
) -> tuple[int, int]:
    """Images of a group and rows of a chunk, cut evenly: whole images, or rows of a single one."""
    g = geometry
    most_rows = min(MAX_ROWS, _MOST_ENTRIES // (4 * g.D * g.K))
    most_images = min(budget // (image_bytes + g.pixels * row_bytes), most_rows // g.pixels, max(g.N, 1))
    images = ceil_div(g.N, ceil_div(g.N, most_images)) if most_images > 1 else 1
    if images > 1:
        return images, images * g.pixels
    rows = max(1, min(most_rows, g.pixels, max(budget - single_image_bytes, budget // 2) // row_bytes))
    if rows == g.pixels:
        return 1, rows
    even = ceil_div(g.pixels, ceil_div(g.pixels, rows))
    # Whole lines of memory for what begins in the middle of an image.
    aligned = ceil_div(even, _ALIGNED_ROWS) * _ALIGNED_ROWS
    return 1, aligned if aligned <= rows else min(rows, max(1, rows // _ALIGNED_ROWS) * _ALIGNED_ROWS)
