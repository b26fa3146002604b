"""The forward pass of deformable convolution: in one fused kernel, or by way of columns [rows, G, K, C/G]."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dcnops._backends.launch_plans.deform_conv2d_common import (
    SampleLaunch,
    column_sample_bytes,
    filters_job,
    sizes_of,
)
from dcnops._backends.launch_plans.heuristics import (
    FUSED_NEEDS,
    SLICE_OUTPUTS,
    ForwardProblem,
    FusedTiles,
    choose_path,
    choose_splits,
    choose_tiles,
    failed,
)
from dcnops._backends.launch_plans.layout import (
    ITEMSIZE,
    MAX_BLOCKS,
    SCALAR,
    THREADS,
    VECTOR_BYTES,
    WORKSPACE_BYTES,
    LayoutJob,
    RowRange,
    are_rows,
    ceil_div,
    change_layout,
    empty_images,
    fill_job,
    is_channels_last,
    rows_job,
)
from dcnops._geometry import DeformConvGeometry, DeformConvSizes
from dcnops._kernels import Engine, Macros

__all__ = ["DeformConvForwardParams", "DeformConvFusedParams", "deform_conv2d", "fused_macros"]

_pointer = ctypes.c_void_p
_int = ctypes.c_int


class DeformConvForwardParams(ctypes.Structure):
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
    filters = engine.empty((geometry.O, geometry.K, geometry.C // geometry.G), weight.dtype)
    problem = ForwardProblem(geometry, str(input.dtype.name), precision, engine.device)
    path = path or choose_path(problem)
    if path == "fused" and (reasons := failed(FUSED_NEEDS, problem)):
        raise ValueError(f"the fused kernel cannot do this: {'; '.join(reasons)}")
    rounds_filters = path == "fused" and choose_tiles(problem).rounds_filters
    jobs = [filters_job(engine, geometry, weight, filters, rounds_filters)]
    run = _run_fused if path == "fused" else _run_columns
    for images in _image_groups(engine, geometry, input, chunk_bytes, path):
        count = images.stop - images.start
        part = problem if count == geometry.N else replace(problem, geometry=replace(geometry, N=count))
        run(
            engine,
            part,
            input[images],
            offset[images],
            None if mask is None else mask[images],
            filters,
            bias,
            output[images],
            jobs,
            chunk_bytes,
        )
        jobs = []
    return output


def _image_groups(
    engine: Engine, geometry: DeformConvGeometry, input: Any, chunk_bytes: int, path: str
) -> Iterator[slice]:
    """The batch in equal groups, such that their copies of the input fit."""
    g = geometry
    itemsize = ITEMSIZE[str(input.dtype.name)]
    image = g.H * g.W * g.C
    most = g.N if are_rows(engine, input) else max(1, chunk_bytes // (image * itemsize))
    if path == "fused":
        most = min(most, max(1, (2**31 - 1) // max(image, g.pixels)))
    else:
        # Columns take their share, too.
        most = min(most, max(1, chunk_bytes // (2 * image * itemsize)))
    size = ceil_div(g.N, ceil_div(g.N, most))
    for first in range(0, g.N, size):
        yield slice(first, min(first + size, g.N))


def _prepare(
    engine: Engine, geometry: DeformConvGeometry, input: Any, jobs: list[LayoutJob]
) -> tuple[Any, list[LayoutJob]]:
    """The input's rows, and the jobs to be done before they are used."""
    g = geometry
    if are_rows(engine, input):
        return input, jobs
    rows = engine.empty((g.N * g.H * g.W, g.C), input.dtype)
    return rows, [*jobs, rows_job(engine, input, g.C, g.H * g.W, RowRange(0, 0, g.N * g.H * g.W), rows)]


def _run_fused(
    engine: Engine,
    problem: ForwardProblem,
    input: Any,
    offset: Any,
    mask: Any | None,
    filters: Any,
    bias: Any | None,
    output: Any,
    jobs: list[LayoutJob],
    chunk_bytes: int,
) -> None:
    g = problem.geometry
    input_rows, jobs = _prepare(engine, g, input, jobs)
    change_layout(engine, problem.dtype, jobs)
    tiles = choose_tiles(problem)
    copied = 0 if input_rows is input else g.N * g.H * g.W * g.C * ITEMSIZE[problem.dtype]
    splits = choose_splits(problem, tiles, chunk_bytes - copied)
    partial = engine.empty((splits, g.N * g.pixels, g.O), engine.xp.float32) if splits > 1 else None
    params = DeformConvFusedParams(
        input=engine.pointer(input_rows),
        offset=engine.pointer(offset),
        mask=engine.pointer(mask),
        filters=engine.pointer(filters),
        bias=engine.pointer(bias),
        output=engine.pointer(output),
        partial=engine.pointer(partial),
        size=sizes_of(g, offset, mask),
        O=g.O,
        rows=g.N * g.pixels,
        group_outputs=g.O // g.G,
        group_channels=g.C // g.G,
        segment=problem.segment,
        steps=problem.steps,
        splits=splits,
        channels_last=is_channels_last(output),
    )
    unit, macros = "deform_conv2d_fused", fused_macros(problem.dtype, str(offset.dtype.name), tiles)
    kernels = {unit: (problem.blocks(tiles.outputs) * splits, tiles.threads)}
    if partial is not None:
        kernels["deform_conv2d_add_splits"] = problem.blocks(SLICE_OUTPUTS), THREADS
    for kernel, (blocks, threads) in kernels.items():
        engine.launch(unit, kernel, macros, min(blocks, MAX_BLOCKS), (threads, 1), params, tiles.shared_bytes)


def fused_macros(dtype: str, offset_dtype: str, tiles: FusedTiles) -> Macros:
    """The macros of unit deform_conv2d_fused."""
    return {
        "DCN_SUFFIX": tiles.suffix,
        "DCN_SCALAR": SCALAR[dtype],
        "DCN_OFFSET_SCALAR": SCALAR[offset_dtype],
        "DCN_VEC": VECTOR_BYTES // ITEMSIZE[dtype],
        "DCN_PRODUCT": tiles.product,
        "DCN_OUTPUTS": tiles.outputs,
        "DCN_BLOCKS": tiles.blocks,
        "DCN_SHARED_BYTES": tiles.shared_bytes,
        **({"DCN_ARCHITECTURE": "90a"} if tiles.by_warpgroups else {}),
    }


def _run_columns(
    engine: Engine,
    problem: ForwardProblem,
    input: Any,
    offset: Any,
    mask: Any | None,
    filters: Any,
    bias: Any | None,
    output: Any,
    jobs: list[LayoutJob],
    chunk_bytes: int,
) -> None:
    g = problem.geometry
    input_rows, jobs = _prepare(engine, g, input, jobs)
    if bias is not None:
        jobs = [*jobs, fill_job(engine, bias, output, g.N, g.O, g.pixels)]
    change_layout(engine, problem.dtype, jobs)

    samples = SampleLaunch(engine, g, problem.dtype, offset, column_sample_bytes(problem.dtype))
    itemsize = ITEMSIZE[problem.dtype]
    copied = 0 if input_rows is input else g.N * g.H * g.W * g.C * itemsize
    most_rows = max(1, max(chunk_bytes - copied, chunk_bytes // 2) // (g.K * g.C * itemsize))
    columns = engine.empty((min(most_rows, g.N * g.pixels), g.G, g.K * g.C // g.G), input.dtype)
    for rows in _column_chunks(g, most_rows, is_channels_last(output)):
        samples.launch(
            "deform_conv2d_forward",
            "deform_conv2d_columns",
            DeformConvForwardParams(
                engine.pointer(input_rows),
                engine.pointer(offset),
                engine.pointer(mask),
                engine.pointer(columns),
                sizes_of(g, offset, mask),
                rows,
                samples.tile_rows,
            ),
            rows.rows,
        )
        _multiply_columns(engine, problem, columns[: rows.rows], filters, output, rows, bias is not None)


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
    engine: Engine, problem: ForwardProblem, columns: Any, filters: Any, output: Any, rows: RowRange, accumulate: bool
) -> None:
    """Output of `rows` (+)= columns [rows, G, K*C/G] times filters, each product straight into its place."""
    g = problem.geometry
    outputs, inner = g.O // g.G, g.K * g.C // g.G
    by_group = filters.reshape(g.G, outputs, inner)
    if is_channels_last(output):
        first = rows.first_image * g.pixels + rows.first_pixel
        place = output.transpose(0, 2, 3, 1).reshape(-1, g.G, outputs)[first : first + rows.rows].transpose(1, 0, 2)
        engine.matmul(columns.transpose(1, 0, 2), by_group.transpose(0, 2, 1), place, accumulate, problem.precision)
        return
    pixels = min(rows.rows, g.pixels)
    images = rows.rows // pixels
    place = output.reshape(g.N, g.G, outputs, g.pixels)[rows.first_image : rows.first_image + images]
    place = place[..., rows.first_pixel : rows.first_pixel + pixels]
    sampled = columns.reshape(images, pixels, g.G, inner).transpose(0, 2, 3, 1)
    if g.G == 1:
        shared = engine.xp.broadcast_to(by_group, (images, outputs, inner))
        engine.matmul(shared, sampled[:, 0], place[:, 0], accumulate, problem.precision)
        return
    for image in range(images):
        engine.matmul(by_group, sampled[image], place[image], accumulate, problem.precision)
