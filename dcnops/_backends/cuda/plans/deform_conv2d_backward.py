"""Backward pass of deformable convolution: groups of images, processed in chunks of columns [rows, G, K, C/G].

A chunk has one array of columns. It first holds their gradient, from which the gradient of the input is summed. The
kernel that computes the gradients of offsets and masks then overwrites it with the columns, for the weight gradient.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from dcnops._backends.cuda.engine import Device, Engine, dtype_name
from dcnops._backends.cuda.heuristics import gathers_input
from dcnops._backends.cuda.kernel_constants import (
    ARRAY_JOBS_SHARED_BYTES,
    BAND_ROWS,
    LIST_PART_BYTES,
    LISTS_PER_THREAD,
    MAX_ROWS,
    THREADS,
    VECTOR_BYTES,
    WARP,
    ceil_div,
)
from dcnops._backends.cuda.plans.array_jobs import (
    ArrayJob,
    ArrayJobsParams,
    RowRange,
    are_rows,
    array_job_tiles,
    array_jobs_params,
    channel_sums_jobs,
    empty_images,
    first_row,
    image_strides,
    is_channels_last,
    pixels_to_rows_job,
    row_ranges,
    rows_to_pixels_job,
    rows_view,
    run_array_jobs,
    zero_job,
)
from dcnops._backends.cuda.plans.deform_conv2d_columns import DeformConvColumnsParams
from dcnops._backends.cuda.plans.deform_conv2d_common import (
    SampleKernels,
    column_kernels,
    filters_job,
    mebibytes,
    sizes_of,
)
from dcnops._backends.cuda.workspace import WORKSPACE_BYTES
from dcnops._dtypes import DTYPES
from dcnops._explain import LOGGER
from dcnops._shapes import DeformConvGeometry, DeformConvSizes, ImageStrides, SamplingStrides

_UNIT = "deform_conv2d_backward"

_MAX_ENTRIES = 2**30
_COUNT_BLOCKS = 4
"""Most blocks per multiprocessor that count list entries."""

_ALIGNED_ROWS = 64

_IMAGES = ("input", "offset", "mask", "columns", "grad_offset", "grad_mask", "grad_input")
_LISTS = ("lengths", "starts", "entries", "parts", "counters")
_DIVISORS = ("taps", "group_taps", "kernel_width", "pixels", "output_width", "rows", "groups", "group_channels")


@dataclass(frozen=True)
class ListLimits:
    """Lengths above which a list is too long for one warp. They affect speed only."""

    part_entries: int = 1024
    """Entries that one warp sums. Other warps sum the rest of a long list, and all of them add atomically."""

    sorted_entries: int = 256
    """Longest list that the deterministic mode sorts, at most 65535. It sums longer ones by repeated searches."""


class Divisor(ctypes.Structure):
    """Division of numbers below 2**31 by a product and a shift (`Divisor` in dcn/rows.cuh)."""

    _fields_ = [("value", ctypes.c_uint), ("magic", ctypes.c_uint), ("shift", ctypes.c_uint)]


def divisor(value: int) -> Divisor:
    """Prepare the division by a value."""
    assert 1 <= value < 2**31
    shift = (value - 1).bit_length()
    return Divisor(value, 2**32 * (2**shift - value) // value + 1, shift)


class DeformConvBackwardParams(ctypes.Structure):
    """Parameters of the kernels of deform_conv2d_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_IMAGES, *_LISTS)),
        ("size", DeformConvSizes),
        ("grad_stride", SamplingStrides),
        ("range", RowRange),
        *((f"by_{name}", Divisor) for name in _DIVISORS),
        ("lists", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("part_entries", "sorted_entries", "warp_bytes", "tile_samples")),
        ("tiles", ctypes.c_uint),
        ("chunk_columns", ctypes.c_uint),
        *((name, ctypes.c_int) for name in ("channels", "write_columns", "count_blocks")),
        ("array_jobs", ArrayJobsParams),
    ]


class BackwardKey(NamedTuple):
    """Everything that the plan of a backward pass depends on: all but the addresses.

    `..._last` is True for an array [N, C, H, W] that is stored as [N, H, W, C], `..._is_rows` if the kernels can also
    read it in place.
    """

    geometry: DeformConvGeometry
    dtype: str
    offset_dtype: str
    weight_dtype: str
    grad_out_last: bool
    input_last: bool
    input_is_rows: bool
    weight_last: bool
    weight_is_rows: bool
    offset_strides: ImageStrides
    mask_strides: ImageStrides
    grad_offset_strides: ImageStrides
    grad_mask_strides: ImageStrides
    needs: frozenset[str]
    deterministic: bool
    precision: str
    workspace_bytes: int
    limits: ListLimits

    @property
    def sum_dtype(self) -> str:
        return DTYPES[self.dtype].sum_dtype

    @property
    def entry_bytes(self) -> int:
        """Bytes of a list entry."""
        return 2 * DTYPES[self.sum_dtype].itemsize

    @property
    def computes_samples(self) -> bool:
        """True if the gradients of offsets or masks are computed."""
        return bool(self.needs & {"offset", "mask"})

    @property
    def propagates(self) -> bool:
        """True if the gradient of the columns is computed."""
        return bool(self.needs & {"input", "offset", "mask"})

    @property
    def gathers(self) -> bool:
        """True if the gradient of the input is gathered by lists."""
        return "input" in self.needs and gathers_input(self.geometry, self.deterministic)

    @property
    def copies_input(self) -> bool:
        return bool(self.needs & {"offset", "mask", "weight"}) and not self.input_is_rows

    @property
    def sums_input(self) -> bool:
        """True if the gradient of the input is summed in scratch memory, not in place."""
        return "input" in self.needs and not (self.input_last and self.dtype == self.sum_dtype)

    @property
    def sums_weight(self) -> bool:
        """True if the gradient of the weights is summed in scratch memory, not in place."""
        return "weight" in self.needs and not (self.weight_last and self.weight_dtype == self.sum_dtype)

    @property
    def splits_grad_out(self) -> bool:
        """True if cuBLAS can read a part of an image [O, oh*ow] as rows: it is slow if oh*ow is not aligned."""
        return self.geometry.pixels * DTYPES[self.dtype].itemsize % VECTOR_BYTES == 0


class ScratchArray(NamedTuple):
    """Temporary array of a plan; `dtype` None means the dtype of the data."""

    shape: tuple[int, ...]
    dtype: str | None = None
    is_zeroed: bool = False


class Chunk(NamedTuple):
    """Rows with columns in memory at the same time, and numbers that the kernels need for them."""

    rows: RowRange
    by_rows: Divisor
    tiles: int
    list_blocks: int
    """Blocks that write list entries."""
    count_blocks: int
    """Blocks that count list entries."""


class BackwardPlan(NamedTuple):
    """Launch plan of a backward pass."""

    key: BackwardKey
    groups: tuple[tuple[slice, tuple[Chunk, ...]], ...]
    """Images that are processed together, and the chunks of their rows."""
    scratch: dict[str, ScratchArray]
    params: DeformConvBackwardParams
    """Parameters of the kernels except addresses and those of groups and chunks."""
    kernels: SampleKernels
    column_kernels: SampleKernels

    def __str__(self) -> str:
        key, chunks = self.key, sum(len(chunks) for _, chunks in self.groups)
        how = "gathered by lists" if key.gathers else "scattered by atomic additions"
        how = how if "input" in key.needs else "not needed"
        rows = self.scratch["columns"].shape[0]
        return (
            f"gradient of the input {how}; {key.geometry.N} images, groups: {len(self.groups)}, chunks: {chunks} "
            f"of at most {rows} rows of columns"
        )


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
    workspace_bytes: int = WORKSPACE_BYTES,
    limits: ListLimits = ListLimits(),
) -> dict[str, Any]:
    """Return the gradients named in `needs`, each in the dtype and memory order of its argument.

    All arrays are contiguous or channels-last, except that the pixels of `offset` and `mask` need only be evenly
    spaced. `weight` may be float32 where `input` is a 16-bit array. `precision` applies to the matrix products of
    float32 data, `limits` to the lists by which the gradient of the input is gathered.

    Scratch memory consists of the following parts, each only where it is needed, with s bytes per element of the data
    and S per sum (4, or 8 for float64):

    - F, once per call: the weights as rows (``O*C/G*K*s``) unless they are channels-last; the sums of their gradient
      (``O*C/G*K*S``) unless it is channels-last and has the dtype of sums; partial sums of the bias (``O*S`` per image,
      or per 1024 rows of a channels-last `grad_out`); 256 bytes.
    - I, per image of a group: the input as rows (``H*W*C*s``) unless it is channels-last; the sums of its gradient
      (``H*W*C*S``) unless it is channels-last and has the dtype of sums; starts and lengths of lists (``8*H*W*D``);
      `grad_out` as rows (``oh*ow*O*s``) unless it is channels-last, or the group has one image and ``oh*ow*s`` is a
      multiple of 16.
    - R, per row of a chunk: columns (``K*C*s``); list entries (``8*D*K*S``) and parts of long lists (``D*K/16``).

    With ``B = workspace_bytes``, a group has as many images as fit in B with all their rows, at least one. If that is
    a single image, a chunk has as many rows as fit in ``max(B - I, B / 2)``, at least one. The total is at most
    ``F + max(B, I + max(B / 2, R))``: B and what the weights need, unless a single image is large.
    """
    g = geometry
    gradients = {
        name: empty_images(engine, array.shape, array.dtype, array)
        for name, array in (("input", input), ("offset", offset), ("weight", weight), ("mask", mask))
        if name in needs and array is not None
    }
    # Array jobs that share a launch with those of the first and of the last group.
    opening: list[ArrayJob] = []
    closing: list[ArrayJob] = []
    if "bias" in needs:
        gradients["bias"] = engine.empty((g.O,), grad_out.dtype)
        sum_parts, sum_up, _partial_sums = channel_sums_jobs(engine, grad_out, g.N, g.O, g.pixels, gradients["bias"])
        opening.append(sum_parts)
        closing.append(sum_up)
    if needs <= {"bias"}:
        run_array_jobs(engine, dtype_name(input.dtype), opening)
        run_array_jobs(engine, dtype_name(input.dtype), closing)
        return gradients
    key = BackwardKey(
        geometry,
        dtype_name(input.dtype),
        dtype_name(offset.dtype),
        dtype_name(weight.dtype),
        grad_out_last=is_channels_last(grad_out),
        input_last=is_channels_last(input),
        input_is_rows=are_rows(engine, input),
        weight_last=is_channels_last(weight),
        weight_is_rows=weight.dtype == input.dtype and are_rows(engine, weight),
        offset_strides=image_strides(offset),
        mask_strides=image_strides(mask),
        grad_offset_strides=image_strides(gradients.get("offset")),
        grad_mask_strides=image_strides(gradients.get("mask")),
        needs=needs,
        deterministic=deterministic,
        precision=precision,
        workspace_bytes=workspace_bytes,
        limits=limits,
    )
    arrays = grad_out, input, offset, mask, *map(gradients.get, ("input", "offset", "mask"))
    _run_plan(engine, engine.recall(_make_plan, key), arrays, weight, gradients.get("weight"), opening, closing)
    return gradients


def gradient_sample_bytes(dtype: str) -> int:
    """Return the shared memory per sampling point, in bytes; the kernels assert that this is enough."""
    return 112 if dtype == "float64" else 64


def _make_plan(engine: Engine, device: Device, key: BackwardKey) -> BackwardPlan:
    g = key.geometry
    images, rows = _sizes_of_group_and_chunk(key)
    kernels = engine.recall(SampleKernels, _UNIT, g, key.dtype, key.offset_dtype, gradient_sample_bytes(key.dtype))
    sorted_columns = 4 * ceil_div(key.limits.sorted_entries, 4)
    warp_bytes = WARP * key.entry_bytes + 4 * sorted_columns + 2 * key.limits.sorted_entries
    params = DeformConvBackwardParams(
        size=sizes_of(g, key.offset_strides, key.mask_strides),
        grad_stride=SamplingStrides.of(key.grad_offset_strides, key.grad_mask_strides),
        by_taps=divisor(g.K),
        by_group_taps=divisor(g.D * g.K),
        by_kernel_width=divisor(g.kw),
        by_pixels=divisor(g.pixels),
        by_output_width=divisor(g.ow),
        by_groups=divisor(g.D),
        by_group_channels=divisor(g.C // g.G),
        part_entries=key.limits.part_entries,
        sorted_entries=key.limits.sorted_entries,
        warp_bytes=ceil_div(warp_bytes, 16) * 16,
        tile_samples=kernels.tile_rows,
        channels=g.C // g.D,
        write_columns="weight" in key.needs,
    )
    slices = [slice(first, min(first + images, g.N)) for first in range(0, g.N, images)]
    chunks = {
        count: tuple(_chunk(g, part, kernels, device) for part in row_ranges(count, g.pixels, rows))
        for count in {part.stop - part.start for part in slices}
    }
    return BackwardPlan(
        key,
        tuple((part, chunks[part.stop - part.start]) for part in slices),
        _scratch_arrays(key, images, rows),
        params,
        kernels,
        column_kernels(engine, g, key.dtype, key.offset_dtype),
    )


def _chunk(geometry: DeformConvGeometry, rows: RowRange, kernels: SampleKernels, device: Device) -> Chunk:
    g = geometry
    samples = ceil_div(rows.rows, BAND_ROWS) * BAND_ROWS * g.K
    list_blocks = ceil_div(rows.rows * g.D * g.K, THREADS)
    count_blocks = min(list_blocks, _COUNT_BLOCKS * device.multiprocessors)
    return Chunk(rows, divisor(rows.rows), g.D * ceil_div(samples, kernels.tile_rows), list_blocks, count_blocks)


def _sizes_of_group_and_chunk(key: BackwardKey) -> tuple[int, int]:
    """Return the images per group and the rows per chunk: whole images, or about equal parts of a single image."""
    g, budget, itemsize = key.geometry, key.workspace_bytes, DTYPES[key.dtype].itemsize
    entries = 4 * g.D * g.K
    image_bytes = g.H * g.W * g.C * (key.copies_input * itemsize + key.sums_input * DTYPES[key.sum_dtype].itemsize)
    row_bytes = g.K * g.C * itemsize
    if key.gathers:
        image_bytes += 8 * g.H * g.W * g.D
        row_bytes += entries * key.entry_bytes + ceil_div(entries * LIST_PART_BYTES, key.limits.part_entries)
    grad_out_bytes = 0 if key.grad_out_last else g.O * g.pixels * itemsize
    single_image_bytes = image_bytes + (0 if key.splits_grad_out else grad_out_bytes)

    max_rows = min(MAX_ROWS, _MAX_ENTRIES // entries)
    whole_image_bytes = image_bytes + grad_out_bytes + g.pixels * row_bytes
    max_images = min(budget // whole_image_bytes, max_rows // g.pixels, max(g.N, 1))
    images = ceil_div(g.N, ceil_div(g.N, max_images)) if max_images > 1 else 1
    if images > 1:
        return images, images * g.pixels
    rows = max(1, min(max_rows, g.pixels, max(budget - single_image_bytes, budget // 2) // row_bytes))
    if rows == g.pixels:
        return 1, rows
    even = ceil_div(g.pixels, ceil_div(g.pixels, rows))
    # A chunk that begins in the middle of an image should begin at a cache line.
    aligned = ceil_div(even, _ALIGNED_ROWS) * _ALIGNED_ROWS
    return 1, aligned if aligned <= rows else min(rows, max(1, rows // _ALIGNED_ROWS) * _ALIGNED_ROWS)


def _scratch_arrays(key: BackwardKey, images: int, rows: int) -> dict[str, ScratchArray]:
    """Return the temporary arrays by name; the columns and the arrays of lists are named like their parameters."""
    g, sums = key.geometry, key.sum_dtype
    pixels, filters = images * g.H * g.W, (g.G, g.O // g.G, g.K * g.C // g.G)
    arrays = {"columns": ScratchArray((rows, g.G, g.K * g.C // g.G))}
    if key.copies_input:
        arrays["input_rows"] = ScratchArray((pixels, g.C))
    if key.sums_input:
        arrays["grad_input_rows"] = ScratchArray((pixels, g.C), sums)
    if not key.grad_out_last and (images > 1 or not key.splits_grad_out):
        arrays["grad_out_rows"] = ScratchArray((images * g.pixels, g.O))
    if key.propagates and not key.weight_is_rows:
        arrays["filters"] = ScratchArray(filters)
    if key.sums_weight:
        arrays["grad_filters"] = ScratchArray(filters, sums, is_zeroed=True)
    if key.gathers:
        entries = 4 * rows * g.D * g.K
        assert entries <= _MAX_ENTRIES
        # One more than there are lists, rounded up to what a thread takes at a time.
        lists = (pixels * g.D // LISTS_PER_THREAD + 1) * LISTS_PER_THREAD
        arrays["lengths"] = ScratchArray((lists,), "int32", is_zeroed=True)
        arrays["starts"] = ScratchArray((lists,), "int32")
        arrays["entries"] = ScratchArray((entries, key.entry_bytes), "uint8")
        arrays["parts"] = ScratchArray((entries // key.limits.part_entries, LIST_PART_BYTES), "uint8")
        arrays["counters"] = ScratchArray((2,), "int32", is_zeroed=True)
    return arrays


def _run_plan(
    engine: Engine,
    plan: BackwardPlan,
    arrays: tuple[Any, ...],
    weight: Any,
    grad_weight: Any | None,
    opening: list[ArrayJob],
    closing: list[ArrayJob],
) -> None:
    """Run a plan on arrays of images; `opening` and `closing` are array jobs of the first and the last launch."""
    key, g = plan.key, plan.key.geometry
    scratch = {
        name: (engine.zeros if array.is_zeroed else engine.empty)(array.shape, array.dtype or key.dtype)
        for name, array in plan.scratch.items()
    }
    if engine.explains:
        size, limit = mebibytes(sum(array.nbytes for array in scratch.values())), mebibytes(key.workspace_bytes)
        text = "deform_conv2d_backward on %s: %s, scratch memory %s (limit without the weights %s)"
        LOGGER.debug(text, engine.device, plan, size, limit)
    filters, grad_filters = scratch.get("filters"), scratch.get("grad_filters")
    shape = (g.G, g.O // g.G, g.K * g.C // g.G)
    if filters is not None:
        opening = [*opening, filters_job(engine, g, weight, filters)]
    elif key.propagates:
        filters = rows_view(weight, g.C // g.G).reshape(shape)
    if grad_filters is not None:
        taps = RowRange(0, 0, g.O * g.K)
        closing = [*closing, rows_to_pixels_job(engine, grad_filters, grad_weight, g.C // g.G, g.K, taps, key.dtype)]
    elif grad_weight is not None:
        grad_filters = rows_view(grad_weight, g.C // g.G).reshape(shape)
        opening = [*opening, zero_job(engine, grad_filters)]
    if not plan.groups:
        run_array_jobs(engine, key.dtype, opening)
        run_array_jobs(engine, key.dtype, closing)
        return
    params = DeformConvBackwardParams.from_buffer_copy(plan.params)
    for name in ("columns", *_LISTS):
        setattr(params, name, engine.pointer(scratch.get(name)))
    with engine.products() as multiply:
        run = _PlanRun(engine, plan, params, scratch, filters, grad_filters, multiply)
        for index, (images, chunks) in enumerate(plan.groups):
            part = [None if array is None else array[images] for array in arrays]
            before = opening if index == 0 else []
            after = closing if index == len(plan.groups) - 1 else []
            run.compute_group(chunks, part, before, after)


class _PlanRun(NamedTuple):
    """Run of a plan on the arrays of one call."""

    engine: Engine
    plan: BackwardPlan
    params: DeformConvBackwardParams
    """Parameters of the kernels; groups and chunks update their part."""
    scratch: dict[str, Any]
    filters: Any | None
    grad_filters: Any | None
    multiply: Callable[..., None]

    def compute_group(
        self, chunks: tuple[Chunk, ...], arrays: list[Any], opening: list[ArrayJob], closing: list[ArrayJob]
    ) -> None:
        """Compute the gradients of a group of images; array jobs share the first and the last launch."""
        grad_out, input, offset, mask, grad_input, grad_offset, grad_mask = arrays
        engine, params, key, g = self.engine, self.params, self.plan.key, self.plan.key.geometry
        N, HW = len(input), g.H * g.W
        pixels, rows = RowRange(0, 0, N * HW), RowRange(0, 0, N * g.pixels)
        if "input_rows" in self.scratch:
            images, input = input, self.scratch["input_rows"]
            opening = [*opening, pixels_to_rows_job(engine, images, g.C, HW, pixels, input)]
        if "grad_out_rows" in self.scratch:
            images, grad_out = grad_out, self.scratch["grad_out_rows"]
            opening = [*opening, pixels_to_rows_job(engine, images, g.O, g.pixels, rows, grad_out)]
        elif key.grad_out_last:
            grad_out = rows_view(grad_out, g.O)
        if "grad_input_rows" in self.scratch:
            images, grad_input = grad_input, self.scratch["grad_input_rows"]
            closing = [rows_to_pixels_job(engine, grad_input, images, g.C, HW, pixels), *closing]
        elif grad_input is not None:
            grad_input = rows_view(grad_input, g.C)
        if grad_input is not None:
            opening = [*opening, zero_job(engine, grad_input)]

        params.size.N, params.lists = N, N * HW * g.D
        params.input, params.offset, params.mask = map(engine.pointer, (input, offset, mask))
        params.grad_input = engine.pointer(grad_input)
        params.grad_offset, params.grad_mask = map(engine.pointer, (grad_offset, grad_mask))
        for chunk in chunks:
            params.range, params.by_rows, params.tiles = chunk.rows, chunk.by_rows, chunk.tiles
            params.chunk_columns = chunk.rows.rows * g.K
            if key.gathers:
                self.make_lists(chunk, opening)
            else:
                run_array_jobs(engine, key.dtype, opening)
            opening = []
            self.compute_chunk(chunk, _grad_out_by_group(g, grad_out, chunk.rows))
        run_array_jobs(engine, key.dtype, closing)

    def make_lists(self, chunk: Chunk, jobs: list[ArrayJob]) -> None:
        """List the samples of a chunk by the pixels that they read; array jobs share the first launch."""
        kernels, params = self.plan.kernels, self.params
        params.array_jobs, params.count_blocks = array_jobs_params(jobs), chunk.count_blocks
        blocks = chunk.count_blocks + array_job_tiles(jobs)
        kernels.launch_blocks("deform_conv2d_prepare", blocks, (THREADS, 1), params, ARRAY_JOBS_SHARED_BYTES)
        kernels.launch_blocks("deform_conv2d_fill_lists", chunk.list_blocks, (THREADS, 1), params)

    def compute_chunk(self, chunk: Chunk, grad_out: Any) -> None:
        """Compute the gradients of a chunk from `grad_out` [G, rows, O/G]."""
        plan, key, params, rows = self.plan, self.plan.key, self.params, chunk.rows.rows
        columns = self.scratch["columns"][:rows].transpose(1, 0, 2)
        if key.propagates:
            self.multiply(grad_out, self.filters, columns, False, key.precision)
        if key.gathers:
            self.gather_input()
        elif "input" in key.needs:
            plan.kernels.launch("deform_conv2d_scatter_input", params, rows)
        if key.computes_samples:
            plan.kernels.launch("deform_conv2d_grad_samples", params, rows)
        elif self.grad_filters is not None:
            arrays = params.input, params.offset, params.mask, params.columns
            forward = DeformConvColumnsParams(*arrays, params.size, chunk.rows, plan.column_kernels.tile_rows)
            plan.column_kernels.launch("deform_conv2d_columns", forward, rows)
        if self.grad_filters is not None:
            self.multiply(grad_out.transpose(0, 2, 1), columns, self.grad_filters, True, key.precision)

    def gather_input(self) -> None:
        """Add the gradients of the columns on the lists to the gradient of the input."""
        kernels, params, warps = self.plan.kernels, self.params, THREADS // WARP
        in_order = self.plan.key.deterministic
        kernel = "deform_conv2d_gather_input_in_order" if in_order else "deform_conv2d_gather_input"
        shared_bytes = warps * params.warp_bytes if in_order else 0
        kernels.launch_blocks(kernel, ceil_div(params.lists, warps), kernels.block, params, shared_bytes)


def _grad_out_by_group(geometry: DeformConvGeometry, grad_out: Any, rows: RowRange) -> Any:
    """Return the gradient of the output at `rows`, [G, rows, O/G]; `grad_out` is one image [1, O, oh, ow] or rows."""
    g = geometry
    first = first_row(rows, g.pixels)
    if grad_out.ndim == 4:
        return grad_out.reshape(g.G, g.O // g.G, g.pixels)[:, :, first : first + rows.rows].transpose(0, 2, 1)
    return grad_out[first : first + rows.rows].reshape(rows.rows, g.G, g.O // g.G).transpose(1, 0, 2)
