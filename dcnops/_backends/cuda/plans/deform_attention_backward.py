"""Backward passes of multi-scale deformable attention and deformable aggregation.

One kernel computes the gradients of locations and weights, and adds to that of the value. The deterministic gradient
of the value has kernels of its own, see `deform_attention_grad_value`.
"""

from __future__ import annotations

import ctypes
from typing import Any

from dcnops._attention_shapes import DeformAggregateGeometry, MSDeformAttnGeometry
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.array_jobs import sum_dtype
from dcnops._backends.cuda.plans.deform_attention_common import (
    AttentionKernels,
    DeformAttentionPoints,
    RowLanes,
    aggregation_points,
    attention_points,
    weights_of,
)
from dcnops._backends.cuda.plans.deform_attention_grad_value import deterministic_grad_value, rounded
from dcnops._backends.cuda.workspace import WORKSPACE_BYTES
from dcnops._explain import LOGGER

_UNIT = "deform_attention_backward"


class DeformAttentionBackwardParams(ctypes.Structure):
    """Parameters of the kernel of deform_attention_backward.cu."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("value", "grad_out", "grad_locations", "grad_weights", "grad_value")),
        ("points", DeformAttentionPoints),
        ("lanes", RowLanes),
    ]


def ms_deform_attn_backward(
    engine: Engine,
    geometry: MSDeformAttnGeometry,
    grad_out: Any,
    value: Any,
    spatial_shapes: Any | None,
    sampling_locations: Any,
    attention_weights: Any,
    needs: frozenset[str],
    deterministic: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> dict[str, Any]:
    """Return the gradients named in `needs`, each in the shape and dtype of its argument.

    All arrays are contiguous. Scratch memory holds the gradient of a 16-bit `value` in float32. With `deterministic`,
    it holds the marks of the strips instead, at most `workspace_bytes` of them unless a single query needs more.
    """
    points = attention_points(engine, geometry, spatial_shapes, sampling_locations, attention_weights)
    arrays = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    gradients = {name: _like(engine, array, grad_out) for name, array in arrays.items() if name in needs}
    sampled = gradients.get("sampling_locations"), gradients.get("attention_weights")
    grad_value = _backward(
        engine, points, grad_out, value, sampling_locations, sampled, "value" in needs, deterministic, workspace_bytes
    )
    return gradients if grad_value is None else {**gradients, "value": grad_value}


def deform_aggregate_backward(
    engine: Engine,
    geometry: DeformAggregateGeometry,
    grad_out: Any,
    input: Any,
    offset: Any,
    mask: Any | None,
    needs: frozenset[str],
    deterministic: bool = False,
    workspace_bytes: int = WORKSPACE_BYTES,
) -> dict[str, Any]:
    """Return the gradients named in `needs`, each in the shape and dtype of its argument.

    See `ms_deform_attn_backward`. The gradient of a packed `offset` is packed, too, and its padding is 0.
    """
    g = geometry
    points = aggregation_points(engine, geometry, offset, mask)
    is_padded = mask is None and offset.shape[3] > 3 * g.G * g.K
    gradients = {
        name: _like(engine, array, grad_out, is_padded)
        for name, array in (("offset", offset), ("mask", mask))
        if array is not None and name in needs
    }
    grad_offset, grad_mask = gradients.get("offset"), gradients.get("mask")
    if mask is None and grad_offset is not None:
        grad_mask = weights_of(g, grad_offset, None)
    grad_input = _backward(
        *(engine, points, grad_out, input, offset, (grad_offset, grad_mask)),
        *("input" in needs, deterministic, workspace_bytes),
    )
    return gradients if grad_input is None else {**gradients, "input": grad_input}


def _like(engine: Engine, array: Any, grad_out: Any, is_padded: bool = False) -> Any:
    """Return a new array that the kernel fills, or zeros if it leaves something out."""
    make = engine.zeros if is_padded or not grad_out.size else engine.empty
    return make(array.shape, array.dtype)


def _backward(
    engine: Engine,
    points: DeformAttentionPoints,
    grad_out: Any,
    value: Any,
    locations: Any,
    sampled: tuple[Any | None, Any | None],
    needs_value: bool,
    deterministic: bool,
    workspace_bytes: int,
) -> Any | None:
    """Write the gradients of locations and weights that are not None, and return that of the value if it is needed."""
    if not grad_out.size or not value.size:
        return engine.zeros(value.shape, value.dtype) if needs_value else None
    grad_locations, grad_weights = sampled
    is_sampled = grad_locations is not None or grad_weights is not None
    kernels = AttentionKernels.of(engine, points.D, locations, value, grad_out)
    is_added = needs_value and not deterministic
    sums = engine.zeros(value.shape, sum_dtype(engine, value.dtype)) if is_added else None
    if is_sampled or is_added:
        lanes, blocks = kernels.rows(points.rows, points.K, 1)
        if engine.explains:
            LOGGER.debug(
                "%s on %s: %d rows of %d points, %d lanes to a row",
                *(_UNIT, engine.device, points.rows, points.K, 1 << lanes.row_bits),
            )
        params = DeformAttentionBackwardParams(
            *map(engine.pointer, (value, grad_out, grad_locations, grad_weights, sums)), points, lanes
        )
        kernels.launch(_UNIT, "deform_attention_backward", blocks, params, kernels.shared_bytes(with_dots=True))
    if sums is not None:
        return rounded(engine, sums, value)
    return deterministic_grad_value(engine, kernels, points, grad_out, value, workspace_bytes) if needs_value else None
