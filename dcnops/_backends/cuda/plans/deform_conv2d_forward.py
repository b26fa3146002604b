"""The forward pass of deformable convolution: in one fused kernel, or by way of columns [rows, G, K, C/G]."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from dcnops._backends.cuda.constants import (
    FUSED_SLICE_OUTPUTS,
    MAX_BLOCKS,
    THREADS,
    VECTOR_BYTES,
    WORKSPACE_BYTES,
    ceil_div,
)
from dcnops._backends.cuda.engine import Device, Engine, Macros, dtype_name
from dcnops._backends.cuda.heuristics import (
    FUSED_NEEDS,
    ForwardProblem,
    FusedTiles,
    choose_images,
    choose_path,
    choose_splits,
    choose_tiles,
    failed,
)
from dcnops._backends.cuda.plans.array_jobs import (
    ArrayJob,
    RowRange,
    are_rows,
    empty_images,
    fill_job,
    is_channels_last,
    pixels_to_rows_job,
    run_array_jobs,
)
from dcnops._backends.cuda.plans.deform_conv2d_common import (
    SampleKernels,
    column_sample_bytes,
    filters_job,
)
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformConvGeometry, DeformConvSizes

_pointer = ctypes.c_void_p
_int = ctypes.c_int


class DeformConvColumnsParams(ctypes.Structure):
    """What the kernel of deform_conv2d_forward.cu takes."""

    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("columns", _pointer),
        ("size", DeformConvSizes),
        ("range", RowRange),
        ("tile_rows", _int),
    ]


class DeformConvFusedParams(ctypes.Structure):
    """What the kernels of deform_conv2d_fused.cu take."""

    _fields_ = [
        ("input", _pointer),
        ("offset", _pointer),
        ("mask", _pointer),
        ("filters", _pointer),
        ("bias", _pointer),
        ("output", _pointer),
        ("partial", _pointer),
        ("size", DeformConvSizes),
        ("O", _int),
        ("rows", _int),
        ("group_outputs", _int),
        ("group_channels", _int),
        ("segment", _int),
        ("steps", _int),
        ("splits", _int),
        ("channels_last", _int),
    ]


def deform_conv2d(
    engine: Engine,
    geometry: DeformConvGeometry,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any | None,
    mask: Any | None,
    precision: str = "ieee",
    chunk_bytes: int = WORKSPACE_BYTES,
    path: str | None = None,
) -> Any:
    """The output [N, O, oh, ow], in the memory order of `input`.

    Each of `input`, `offset` and `mask` is contiguous or channels-last. The batch goes through in groups of images
    whose scratch memory stays below `chunk_bytes`: the channels-last copy of an input that is not, and columns or the
    parts of split sums. An image that needs more by itself is a group of its own. The rearranged weights come on top.

    `path` is "fused" or "columns" where it is not left to `choose_path`.
    """
    output = empty_images(engine, geometry.output_shape, input.dtype, input)
    if output.size == 0:
        return output
    call = _Call(
        geometry,
        dtype_name(input.dtype),
        dtype_name(offset.dtype),
        are_rows(engine, input),
        is_channels_last(offset),
        mask is not None and is_channels_last(mask),
        is_channels_last(output),
        precision,
        chunk_bytes,
        path,
    )
    groups = engine.recall(_groups, call)
    filters = engine.empty((geometry.O, geometry.K, geometry.C // geometry.G), weight.dtype)
    jobs = [filters_job(engine, geometry, weight, filters, groups[0][1].rounds_filters)]
    if len(groups) == 1:
        groups[0][1].run(input, offset, mask, output, filters, bias, jobs)
        return output
    for images, group in groups:
        part_of_mask = None if mask is None else mask[images]
        group.run(input[images], offset[images], part_of_mask, output[images], filters, bias, jobs)
        jobs = []
    return output


class _Call(NamedTuple):
    """All that the plan of a call depends on: everything but addresses."""

    geometry: DeformConvGeometry
    dtype: str
    offset_dtype: str
    has_rows: bool
    """Whether the input is read as it is."""
    offset_last: bool
    mask_last: bool
    output_last: bool
    precision: str
    chunk_bytes: int
    path: str | None


def _groups(engine: Engine, device: Device, call: _Call) -> list[tuple[slice, _Fused | _Columns]]:
    """The batch in groups of images, and how each is computed."""
    g = call.geometry
    problem = ForwardProblem(g, call.dtype, call.precision, device)
    path = call.path or choose_path(problem)
    if path == "fused" and (reasons := failed(FUSED_NEEDS, problem)):
        raise ValueError(f"the fused kernel cannot do this: {'; '.join(reasons)}")
    # As many images as leave room for their copies of the input.
    image = g.H * g.W * g.C
    image_bytes = image * DTYPES[call.dtype].itemsize
    most = g.N if call.has_rows else max(1, call.chunk_bytes // image_bytes)
    if path == "fused":
        size = choose_images(problem, choose_tiles(problem), min(most, max(1, (2**31 - 1) // max(image, g.pixels))))
    else:
        # Columns take their share, too.
        most = min(most, max(1, call.chunk_bytes // (2 * image_bytes)))
        size = ceil_div(g.N, ceil_div(g.N, most))
    make: Callable[..., _Fused | _Columns] = _Fused if path == "fused" else _Columns
    ranges = [slice(first, min(first + size, g.N)) for first in range(0, g.N, size)]
    parts = [call._replace(geometry=replace(g, N=images.stop - images.start)) for images in ranges]
    return [(images, engine.recall(make, part)) for images, part in zip(ranges, parts)]


def _input_rows(engine: Engine, call: _Call, input: Any, jobs: list[ArrayJob]) -> tuple[Any, list[ArrayJob]]:
    """The input's rows, and the jobs to be done before they are used."""
    if call.has_rows:
        return input, jobs
    g = call.geometry
    rows = engine.empty((g.N * g.H * g.W, g.C), input.dtype)
    return rows, [*jobs, pixels_to_rows_job(engine, input, g.C, g.H * g.W, RowRange(0, 0, g.N * g.H * g.W), rows)]


class _Fused:
    """A group of images in one fused kernel, and one that adds up where sums are split."""

    def __init__(self, engine: Engine, device: Device, call: _Call) -> None:
        g = call.geometry
        problem = ForwardProblem(g, call.dtype, call.precision, device)
        tiles = choose_tiles(problem)
        copied = 0 if call.has_rows else g.N * g.H * g.W * g.C * DTYPES[call.dtype].itemsize
        splits = choose_splits(problem, tiles, call.chunk_bytes - copied)
        self.rounds_filters = tiles.rounds_filters
        self._engine, self._call = engine, call
        self._partial = (splits, g.N * g.pixels, g.O) if splits > 1 else None
        self._numbers = (
            g.params(call.offset_last, call.mask_last),
            g.O,
            g.N * g.pixels,
            g.O // g.G,
            g.C // g.G,
            problem.segment,
            problem.steps,
            splits,
            call.output_last,
        )
        unit, macros = "deform_conv2d_fused", fused_macros(call.dtype, call.offset_dtype, tiles)
        kernels = {unit: (problem.blocks(tiles.outputs) * splits, tiles.threads)}
        if splits > 1:
            kernels["deform_conv2d_add_splits"] = problem.blocks(FUSED_SLICE_OUTPUTS), THREADS
        self._shared_bytes = tiles.shared_bytes
        self._launches = [
            (engine.kernel(unit, kernel, macros), min(blocks, MAX_BLOCKS), (threads, 1))
            for kernel, (blocks, threads) in kernels.items()
        ]

    def run(
        self,
        input: Any,
        offset: Any,
        mask: Any | None,
        output: Any,
        filters: Any,
        bias: Any | None,
        jobs: list[ArrayJob],
    ) -> None:
        engine, call = self._engine, self._call
        input_rows, jobs = _input_rows(engine, call, input, jobs)
        run_array_jobs(engine, call.dtype, jobs)
        partial = None if self._partial is None else engine.empty(self._partial, engine.xp.float32)
        arrays = input_rows, offset, mask, filters, bias, output, partial
        params = DeformConvFusedParams(*map(engine.pointer, arrays), *self._numbers)
        for launch, blocks, block in self._launches:
            launch(blocks, block, self._shared_bytes, params)


def fused_macros(dtype: str, offset_dtype: str, tiles: FusedTiles) -> Macros:
    """The macros of unit deform_conv2d_fused."""
    return {
        "DCN_SUFFIX": tiles.suffix,
        "DCN_SCALAR": DTYPES[dtype].c_name,
        "DCN_OFFSET_SCALAR": DTYPES[offset_dtype].c_name,
        "DCN_VEC": VECTOR_BYTES // DTYPES[dtype].itemsize,
        "DCN_PRODUCT": tiles.product,
        "DCN_OUTPUTS": tiles.outputs,
        "DCN_BLOCKS": tiles.blocks,
        "DCN_SHARED_BYTES": tiles.shared_bytes,
        **({"DCN_ARCHITECTURE": "90a"} if tiles.by_warpgroups else {}),
    }


class _Columns:
    """A group of images in chunks of columns, each multiplied by the filters."""

    rounds_filters = False

    def __init__(self, engine: Engine, device: Device, call: _Call) -> None:
        g = call.geometry
        itemsize = DTYPES[call.dtype].itemsize
        copied = 0 if call.has_rows else g.N * g.H * g.W * g.C * itemsize
        most_rows = max(1, max(call.chunk_bytes - copied, call.chunk_bytes // 2) // (g.K * g.C * itemsize))
        self._engine, self._call, self._most_rows = engine, call, most_rows
        self._columns = (min(most_rows, g.N * g.pixels), g.G, g.K * g.C // g.G)
        self._sizes = g.params(call.offset_last, call.mask_last)
        self._kernels = engine.recall(
            SampleKernels, "deform_conv2d_columns", g, call.dtype, call.offset_dtype, column_sample_bytes(call.dtype)
        )

    def run(
        self,
        input: Any,
        offset: Any,
        mask: Any | None,
        output: Any,
        filters: Any,
        bias: Any | None,
        jobs: list[ArrayJob],
    ) -> None:
        engine, call, g = self._engine, self._call, self._call.geometry
        input_rows, jobs = _input_rows(engine, call, input, jobs)
        if bias is not None:
            jobs = [*jobs, fill_job(engine, bias, output, g.N, g.O, g.pixels)]
        run_array_jobs(engine, call.dtype, jobs)
        columns = engine.empty(self._columns, input.dtype)
        pointers = map(engine.pointer, (input_rows, offset, mask, columns))
        params = DeformConvColumnsParams(*pointers, self._sizes, tile_rows=self._kernels.tile_rows)
        with engine.products() as matmul:
            for rows in _column_chunks(g, self._most_rows, call.output_last):
                params.range = rows
                self._kernels.launch("deform_conv2d_columns", params, rows.rows)
                _multiply_columns(engine, matmul, call, columns[: rows.rows], filters, output, rows, bias is not None)


def _column_chunks(geometry: DeformConvGeometry, most_rows: int, channels_last: bool) -> Iterator[RowRange]:
    """All rows in stretches that a few products can turn into output: whole images, or a part of one."""
    g = geometry
    P = g.pixels
    if channels_last:
        for first in range(0, g.N * P, most_rows):
            yield RowRange(first // P, first % P, min(most_rows, g.N * P - first))
    elif most_rows >= P:
        images = most_rows // P
        for image in range(0, g.N, images):
            yield RowRange(image, 0, min(images, g.N - image) * P)
    else:
        for image in range(g.N):
            for pixel in range(0, P, most_rows):
                yield RowRange(image, pixel, min(most_rows, P - pixel))


def _multiply_columns(
    engine: Engine,
    matmul: Callable[..., None],
    call: _Call,
    columns: Any,
    filters: Any,
    output: Any,
    rows: RowRange,
    accumulate: bool,
) -> None:
    """Output of `rows` (+)= columns [rows, G, K*C/G] times filters, each product straight into its place."""
    g = call.geometry
    outputs, inner = g.O // g.G, g.K * g.C // g.G
    by_group = filters.reshape(g.G, outputs, inner)
    if call.output_last:
        first = rows.first_image * g.pixels + rows.first_pixel
        place = output.transpose(0, 2, 3, 1).reshape(-1, g.G, outputs)[first : first + rows.rows].transpose(1, 0, 2)
        matmul(columns.transpose(1, 0, 2), by_group.transpose(0, 2, 1), place, accumulate, call.precision)
        return
    pixels = min(rows.rows, g.pixels)
    images = rows.rows // pixels
    place = output.reshape(g.N, g.G, outputs, g.pixels)[rows.first_image : rows.first_image + images]
    place = place[..., rows.first_pixel : rows.first_pixel + pixels]
    sampled = columns.reshape(images, pixels, g.G, inner).transpose(0, 2, 3, 1)
    if g.G == 1:
        shared = engine.xp.broadcast_to(by_group, (images, outputs, inner))
        matmul(shared, sampled[:, 0], place[:, 0], accumulate, call.precision)
        return
    for image in range(images):
        matmul(by_group, sampled[image], place[image], accumulate, call.precision)
