"""Deterministic gradient of the value of attention and aggregation: each strip of pixels gathers its points."""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.kernel_constants import MAX_ROWS, STRIP_PADDING, WARP, ceil_div, strip_pixels
from dcnops._backends.cuda.plans.array_jobs import images_from_rows, sum_dtype
from dcnops._backends.cuda.plans.deform_attention_common import (
    LEVELS_BYTES,
    WARPS,
    AttentionKernels,
    DeformAttentionPoints,
)
from dcnops._explain import LOGGER

_UNIT = "deform_attention_grad_value"
_WORD_POINTS = 32 * WARP
"""Points that a word of marks covers."""


class DeformAttentionGradValueParams(ctypes.Structure):
    """Parameters of the kernels of deform_attention_grad_value.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad_out", "marks", "grad_value", "sums")),
        ("points", DeformAttentionPoints),
        ("first_head", ctypes.c_longlong),
        ("heads", ctypes.c_longlong),
        *((name, ctypes.c_int) for name in ("first_query", "queries", "strips", "words", "lane_bits")),
    ]


def deterministic_grad_value(
    engine: Engine,
    kernels: AttentionKernels,
    points: DeformAttentionPoints,
    grad_out: Any,
    value: Any,
    workspace_bytes: int,
) -> Any:
    """Return the gradient of the value, summed in a fixed order.

    The marks, a bit for each strip and block of points, are made for as many heads as fit `workspace_bytes`, or for a
    part of the queries of one head.
    """
    p, strip = points, strip_pixels(kernels.sum_bytes, kernels.vector)
    strips, words = ceil_div(p.S, strip), ceil_div(p.Lq * p.K, _WORD_POINTS)
    fitting = max(1, workspace_bytes // (4 * strips))
    heads = max(1, min(p.N * p.M, fitting // words))
    queries = max(1, min(p.Lq, fitting * _WORD_POINTS // p.K, MAX_ROWS // p.K))
    # The sums over all queries of a head are final: they are written directly in the dtype of the value.
    is_whole = queries == p.Lq
    gradient = engine.empty(value.shape, value.dtype) if is_whole else None
    sums = None if is_whole else engine.zeros(value.shape, sum_dtype(engine, value.dtype))
    if engine.explains:
        LOGGER.debug(
            "gradient of the value collected by strips of %d pixels, %d heads and %d queries at a time",
            *(strip, heads, queries),
        )
    params = DeformAttentionGradValueParams(
        grad_out=engine.pointer(grad_out),
        grad_value=engine.pointer(gradient),
        sums=engine.pointer(sums),
        points=points,
        strips=strips,
        lane_bits=kernels.lane_bits,
    )
    for params.first_head in range(0, p.N * p.M, heads):
        params.heads = min(heads, p.N * p.M - params.first_head)
        for params.first_query in range(0, p.Lq, queries):
            params.queries = min(queries, p.Lq - params.first_query)
            _add_points(engine, kernels, params)
    return gradient if sums is None else rounded(engine, sums, value)


def _add_points(engine: Engine, kernels: AttentionKernels, params: DeformAttentionGradValueParams) -> None:
    """Add the points of the heads and queries that the parameters name."""
    points = params.queries * params.points.K
    params.words = ceil_div(points, _WORD_POINTS)
    marks = engine.zeros((params.heads, params.strips, params.words), "int32")
    params.marks = engine.pointer(marks)
    blocks = ceil_div(params.heads * ceil_div(points, WARP), WARPS)
    kernels.launch(_UNIT, "deform_attention_mark_strips", blocks, params, LEVELS_BYTES)
    strip = strip_pixels(kernels.sum_bytes, kernels.vector)
    shared_bytes = LEVELS_BYTES + WARPS * strip * (WARP * kernels.vector + STRIP_PADDING) * kernels.sum_bytes
    blocks = params.heads * params.strips * kernels.slices
    kernels.launch(_UNIT, "deform_attention_grad_value", blocks, params, shared_bytes)


def rounded(engine: Engine, sums: Any, value: Any) -> Any:
    """Return sums in the shape and dtype of the value: themselves, unless the value is 16-bit."""
    if sums.dtype == value.dtype:
        return sums
    rows, channels = value.shape[0] * value.shape[1], value.size // (value.shape[0] * value.shape[1])
    images = images_from_rows(engine, sums, value.reshape(rows, channels, 1, 1), rows, channels, 1)
    return images.reshape(value.shape)
