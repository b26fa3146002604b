"""Forward pass of deformable convolution: one fused kernel, or columns and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dcnops._backends.cuda.engine import Device, Engine, dtype_name
from dcnops._backends.cuda.heuristics import (
    FUSED_NEEDS,
    FUSED_PAYS,
    ForwardProblem,
    choose_group_size,
    choose_path,
    choose_tiles,
    reasons_against,
)
from dcnops._backends.cuda.kernel_constants import ceil_div
from dcnops._backends.cuda.plans.array_jobs import are_rows, empty_images, image_strides, is_channels_last
from dcnops._backends.cuda.plans.deform_conv2d_columns import ColumnsPlan
from dcnops._backends.cuda.plans.deform_conv2d_common import ForwardKey, filters_job, mebibytes
from dcnops._backends.cuda.plans.deform_conv2d_fused import FusedPlan
from dcnops._backends.cuda.workspace import WORKSPACE_BYTES
from dcnops._dtypes import DTYPES
from dcnops._explain import LOGGER
from dcnops._shapes import DeformConvGeometry


def deform_conv2d(
    engine: Engine,
    geometry: DeformConvGeometry,
    input: Any,
    offset: Any,
    weight: Any,
    bias: Any | None,
    mask: Any | None,
    precision: str = "ieee",
    workspace_bytes: int = WORKSPACE_BYTES,
    path: str | None = None,
) -> Any:
    """Return the output [N, O, oh, ow], in the memory order of `input`.

    `input` is contiguous or channels-last, the pixels of `offset` and `mask` are evenly spaced, and `weight` may be
    float32 where `input` is a 16-bit array. The batch is processed in groups of images
    that need at most `workspace_bytes` of scratch memory for a channels-last copy of the input, if needed, and for
    columns or the partial sums of split-K. A single image may need more. The rearranged weights are not counted.

    `path` is "fused" or "columns"; None leaves it to `choose_path`.
    """
    output = empty_images(engine, geometry.output_shape, input.dtype, input)
    if output.size == 0:
        return output
    key = ForwardKey(
        geometry,
        dtype_name(input.dtype),
        dtype_name(offset.dtype),
        input_is_rows=are_rows(engine, input),
        offset_strides=image_strides(offset),
        mask_strides=image_strides(mask),
        output_last=is_channels_last(output),
        precision=precision,
        workspace_bytes=workspace_bytes,
        path=path,
    )
    groups = engine.recall(_plan_groups, key)
    if engine.explains:
        _explain(key, engine.device, groups)
    filters = engine.empty((geometry.O, geometry.K, geometry.C // geometry.G), input.dtype)
    jobs = [filters_job(engine, geometry, weight, filters, groups[0][1].rounds_filters)]
    if len(groups) == 1:
        groups[0][1].run(input, offset, mask, output, filters, bias, jobs)
        return output
    for images, plan in groups:
        part_of_mask = None if mask is None else mask[images]
        plan.run(input[images], offset[images], part_of_mask, output[images], filters, bias, jobs)
        jobs = []
    return output


def _plan_groups(engine: Engine, device: Device, key: ForwardKey) -> list[tuple[slice, FusedPlan | ColumnsPlan]]:
    """Cut the batch into groups of images and plan each."""
    g = key.geometry
    problem = ForwardProblem(g, key.dtype, key.precision, device)
    path = key.path or choose_path(problem)
    if path == "fused" and (reasons := reasons_against(FUSED_NEEDS, problem)):
        raise ValueError(f"the fused kernel cannot do this: {'; '.join(reasons)}")
    # Copies of the input must fit the workspace.
    image = g.H * g.W * g.C
    image_bytes = image * DTYPES[key.dtype].itemsize
    most = g.N if key.input_is_rows else max(1, key.workspace_bytes // image_bytes)
    if path == "fused":
        size = choose_group_size(problem, choose_tiles(problem), min(most, max(1, (2**31 - 1) // max(image, g.pixels))))
    else:
        # Columns need part of the workspace, too.
        most = min(most, max(1, key.workspace_bytes // (2 * image_bytes)))
        size = ceil_div(g.N, ceil_div(g.N, most))
    make: Callable[..., FusedPlan | ColumnsPlan] = FusedPlan if path == "fused" else ColumnsPlan
    ranges = [slice(first, min(first + size, g.N)) for first in range(0, g.N, size)]
    parts = [key._replace(geometry=replace(g, N=images.stop - images.start)) for images in ranges]
    return [(images, engine.recall(make, part)) for images, part in zip(ranges, parts)]


def _explain(key: ForwardKey, device: Device, groups: list[tuple[slice, FusedPlan | ColumnsPlan]]) -> None:
    problem = ForwardProblem(key.geometry, key.dtype, key.precision, device)
    is_fused = isinstance(groups[0][1], FusedPlan)
    reasons = reasons_against(FUSED_NEEDS + FUSED_PAYS, problem) or ["the fused kernel supports the call and is faster"]
    why = "it was asked for" if key.path else "; ".join(reasons)
    path, limit = "fused" if is_fused else "columns", mebibytes(key.workspace_bytes)
    LOGGER.debug("deform_conv2d on %s: %s path, because %s; scratch limit %s", device, path, why, limit)
    for plan in dict.fromkeys(plan for _, plan in groups):
        LOGGER.debug("groups: %d, each of %s", sum(other is plan for _, other in groups), plan)
